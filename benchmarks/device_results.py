"""The section of docs/results.md on accelerators, from what `benchmarks/device/run.sh` wrote there.

A case that was not reached in a run's time has no row; how many there were is said.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.device.checks import FAIL
from benchmarks.device.report import table
from idlm_jax.qwen3_sizes import QWEN3_SIZES

Line = dict[str, Any]
Rows = tuple[list[str], list[list[str]]]  # header and rows

FORMULA = (
    "Read: the bytes of bfloat16 weights, without the embedding, of which a step looks up a few rows, and of keys and "
    "values behind every request, over the bandwidth of a copy measured on the same device."
)


class Run(NamedTuple):
    """One folder of results: parts by file name, and the copy bandwidth of its kernels part in bytes/s."""

    folder: Path
    parts: dict[str, Line]
    copy_bytes_s: float | None


def runs(results: Path) -> Iterator[Run]:
    """Every folder in which a part of the kit wrote its JSON on an accelerator, by date."""
    for folder in sorted(results.iterdir()):
        parts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        parts = {name: part for name, part in parts.items() if "platform" in part.get("environment", {})}
        if parts and not any(part["is_dry"] for part in parts.values()):
            floors = next((part["floors"] for part in parts.values() if part["floors"]), None)
            yield Run(folder, parts, None if floors is None else floors["copy_gb_s"] * 1e9)


def section(results: Path) -> str:
    """Tables of every run, under one heading; empty where there is none."""
    found = ["\n\n".join(_tables(run)) for run in runs(results)]
    return "\n\n".join(["## On accelerators", FORMULA, *found]) + "\n" if found else ""


def _tables(run: Run) -> list[str]:
    environment = next(iter(run.parts.values()))["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("driver", "jax", "jaxlib", "triton"))
    commands = "; ".join(f"`{part['environment']['command']}`" for part in run.parts.values())
    tables = [f"### {environment['device']}, {environment['date'][:10]}", f"{versions}: {commands}."]
    lines = {
        # An older revision's file may lack a kind.
        kind: [line for part in run.parts.values() for line in part.get(kind, [])]
        for kind in ("checks", "speeds", "torch", "serving", "steps", "exact", "conversions", "notes")
    }
    if lines["checks"]:
        failed = sum(check["status"] == FAIL for check in lines["checks"])
        tables.append(f"Kernels: {len(lines['checks'])} checks against float32, {failed} failed.")
    if timed := [line for line in lines["speeds"] if line["timing"]]:
        tables.append(table(*_kernels(timed, [line for line in lines["torch"] if "median_ms" in line])))
    elif lines["speeds"]:
        tables.append("No kernel was timed by itself: the checks took the time.")
    conversions = lines["conversions"]
    found = (
        _serving(lines["serving"], run.copy_bytes_s),
        _training(lines["steps"]),
        _exact(lines["exact"]),
        _conversions(conversions),
        _decoding(conversions),
    )
    tables += [table(header, rows) for header, rows in found if rows]
    tables += lines["notes"]
    left = sum(not line["timing"] for line in lines["speeds"])
    left += sum(line["median_ms"] is None for line in [*lines["serving"], *lines["steps"]])
    left += sum(not line["prompts"] for line in lines["exact"]) + sum(not line["heldout"] for line in conversions)
    return [
        *tables,
        f"Not reached in the time of this run: {left} cases. Everything: `benchmarks/results/{run.folder.name}`.",
    ]


def _kernels(timed: Sequence[Line], rivals: Sequence[Line]) -> Rows:
    """What was timed of ours and its rivals in jax, and what PyTorch took for the same cases."""
    rows = [
        [
            line["case"],
            line["program"],
            f"{line['timing']['median_s'] * 1e3:.4f}",
            f"{line['timing']['iqr_s'] * 1e3:.4f}",
            "" if line["of_floor"] is None else f"{line['of_floor']:.0%}",
        ]
        for line in timed
    ]
    cases = {line["case"] for line in timed}
    rows += [
        [line["case"], line["program"], f"{line['median_ms']:.4f}", f"{line['iqr_ms']:.4f}", ""]
        for line in rivals
        if line["case"] in cases
    ]
    rows.sort(key=lambda row: row[0])
    return ["kernel and case", "program", "ms", "quartiles apart", "of the floor"], rows


def _serving(lines: Sequence[Line], copy_bytes_s: float | None) -> Rows:
    rows = []
    for line in lines:
        if line["median_ms"] is None:
            continue
        size, stride, batch, context = line["case"].split("_")
        share = ""
        if copy_bytes_s is not None:
            least_ms = 1e3 * _bytes_read(size, int(batch[1:]), int(context)) / copy_bytes_s
            share = f"{least_ms:.2f} ms, {least_ms / line['median_ms']:.0%}"
        spread = f"{line['median_ms']:.2f} ± {line['iqr_ms'] / 2:.2f}"
        rows.append([size, batch[1:], context, _method(stride), spread, share, f"{line['break_even']:.3f}"])
    return ["model", "batch", "context", "decode step", "ms", "read at copy speed", "break-even TPF"], rows


def _method(stride: str) -> str:
    """Of a part of a case's name: n1, n4, or n4r7 with so many rows."""
    most, _, rows = stride[1:].partition("r")
    return "AR" if stride == "n1" else f"ISD, N = {most}" + (f", {rows} rows" if rows else "")


def _bytes_read(size: str, batch: int, context: int) -> int:
    config = QWEN3_SIZES[size]
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch * context
    return 2 * (config.num_params - embedding + cache)


def _training(lines: Sequence[Line]) -> Rows:
    rows = [
        [
            line["case"],
            f"{line['median_ms']:.0f} ± {line['iqr_ms'] / 2:.0f}",
            f"{line['tokens_per_s']:,.0f}",
            f"{line['mfu']:.1%}",
            f"{line['peak_bytes'] / 2**30:.1f}",
        ]
        for line in lines
        if line["median_ms"] is not None
    ]
    return ["training step", "ms", "tokens/s", "MFU (`train/flops.py`)", "peak GiB"], rows


def _exact(lines: Sequence[Line]) -> Rows:
    rows = []
    for line in lines:
        if line["prompts"]:
            dtype, mode, stride, batch = line["case"].split("_")
            sums = "-" if line["differing_checksums"] is None else str(line["differing_checksums"])
            counts = [f"{line['prompts']:,}", f"{line['tokens']:,}", str(line["differing_tokens"]), sums]
            rows.append([dtype, mode, _method(stride), batch[1:], *counts])
    header = ["dtype", "mode", "against AR alone", "batch", "prompts", "tokens"]
    return [*header, "differing tokens", "differing checksums"], rows


def _conversions(lines: Sequence[Line]) -> Rows:
    """A parent and what was made of it, on held-out rows; acceptance is teacher-forced, at temperature 1."""
    rows = []
    for line in lines:
        heldout = line["heldout"]
        if heldout:
            depths = [value for name, value in sorted(heldout.items()) if name.startswith("acceptance/depth_")]
            acceptance = f"{heldout['acceptance']:.3f}" if depths else ""
            by_depth = " ".join(f"{value:.3f}" for value in depths)
            counts = [f"{line['steps']:,}", f"{line['tokens'] / 1e6:.1f}", f"{heldout['ce_clean']:.3f}"]
            rows.append([line["case"], *counts, acceptance, by_depth, line["note"]])
    return ["training run", "steps", "M tokens", "held-out loss", "acceptance", "by depth", "note"], rows


def _decoding(lines: Sequence[Line]) -> Rows:
    """Held-out prompts decoded with each conversion, in bfloat16."""
    suffix = ": prompts unlike AR"  # after the name of a greedy method, in `Conversion.tokens_per_forward`
    rows = []
    for line in lines:
        rates = line["tokens_per_forward"]
        for name, rate in rates.items():
            if not name.endswith(suffix):
                unlike = rates.get(name + suffix)
                rows.append([line["case"], name, f"{rate:.3f}", "" if unlike is None else f"{unlike:.0f}"])
    return ["conversion", "method", "TPF", "prompts unlike AR (bfloat16)"], rows
