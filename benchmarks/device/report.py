"""Results on disk: JSON with everything, Markdown to read; both say on what they were measured."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from benchmarks.device.checks import FAIL, Check
from benchmarks.device.floors import Floors
from benchmarks.device.speed import Speed
from benchmarks.device.tuning import Candidate

if TYPE_CHECKING:  # each needs packages that a run of another part does without
    from benchmarks.device.convert import Conversion
    from benchmarks.device.exact import ExactLine
    from benchmarks.device.serve_steps import ServeSpeed
    from benchmarks.device.train_steps import StepSpeed

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton")


@dataclasses.dataclass(kw_only=True)
class Report:
    """All that a run found; grows as the run goes on.

    Attributes:
        environment: device, versions, revision, date, command.
        is_dry: nothing here was timed.
        floors: ceilings of the device.
        checks: correctness.
        speeds: our bodies and their rivals.
        steps: whole training steps.
        serving: decode steps of the server.
        exact: R-ISD against AR, bit for bit.
        conversions: a parent trained here, and what was made of it.
        torch: lines of `torch_rivals.py`, or why there are none.
        candidates: tile choices.
        notes: lines of a part that writes its results itself.
        tiles_entry: the winners, as text for `tiles.py`.
        elapsed_s: of the whole run.
    """

    environment: dict[str, str]
    is_dry: bool
    floors: Floors | None = None
    checks: list[Check] = dataclasses.field(default_factory=list)
    speeds: list[Speed] = dataclasses.field(default_factory=list)
    steps: "list[StepSpeed]" = dataclasses.field(default_factory=list)
    serving: "list[ServeSpeed]" = dataclasses.field(default_factory=list)
    exact: "list[ExactLine]" = dataclasses.field(default_factory=list)
    conversions: "list[Conversion]" = dataclasses.field(default_factory=list)
    torch: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    tiles_entry: str = ""
    elapsed_s: float = 0.0

    @property
    def num_failed(self) -> int:
        return sum(check.status == FAIL for check in self.checks) + sum(line.has_failed for line in self.exact)

    def resumed(self, folder: Path) -> list[dict[str, Any]]:
        """The exact lines of `exact.json` if this device, revision and versions wrote it, else nothing."""
        path = folder / "exact.json"
        if not path.is_file():
            return []
        before = json.loads(path.read_text())
        changing = {"date": "", "command": ""}
        is_same = before["environment"] | changing == self.environment | changing
        if not is_same or before["is_dry"] != self.is_dry:
            return []
        return before["exact"]

    def write(self, folder: Path, part: str) -> None:
        """Replaces `<part>.json` and `<part>.md`: a run that is cut off leaves what it had."""
        folder.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(self)
        for name, text in ((f"{part}.json", json.dumps(content, indent=1)), (f"{part}.md", self.markdown())):
            scratch = folder / f"{name}.part"
            scratch.write_text(text + "\n")
            os.replace(scratch, folder / name)

    def markdown(self) -> str:
        """Tables in the order in which they matter."""
        sections = [
            f"# {self.environment['device']}, {self.environment['date']}" + " (dry: nothing timed)" * self.is_dry
        ]
        sections.append(table(["", ""], [[name, value] for name, value in self.environment.items()]))
        if self.floors and not self.is_dry:
            sections.append(
                f"Floors of this run: copy {self.floors.copy_gb_s:.0f} GB/s (read plus written), "
                f"bfloat16 8192^3 product {self.floors.matmul_tflop_s:.0f} TFLOP/s."
            )
        if self.checks:
            counts = ", ".join(f"{count} {status}" for status, count in Counter(c.status for c in self.checks).items())
            sections.append(f"## Correctness: {counts}\n\n" + table(*_check_rows(self.checks)))
            reasons = dict.fromkeys((check.case.split("/")[0], check.reason) for check in self.checks if check.reason)
            sections.append("\n".join(f"- {op}: {reason}" for op, reason in reasons))
        if self.speeds:
            sections.append("## Speed\n\n" + table(*_speed_rows(self.speeds)))
            formulas = dict.fromkeys((line.case.split("/")[0], line.formula) for line in self.speeds if line.formula)
            sections.append("\n".join(f"- {op}: {formula}" for op, formula in formulas))
        if self.steps:
            sections.append(
                "## Training steps\n\nRandom weights, full rows of random tokens, all supervised. MFU counts what the "
                "method needs (`train/flops.py`) against the published bfloat16 peak.\n\n"
                + table(*_step_rows(self.steps))
            )
        if self.serving:
            sections.append(
                "## Decode steps of the server\n\nRandom weights, greedy, steps launched ahead as the engine does. "
                '"Break-even" is what a forward must commit to equal AR here: the ratio of the two steps. The last '
                "column is derived, not measured: tokens/s if drafts were accepted as the tiny adapter's are "
                "(`TRACE` in `serve_steps.py`).\n\n" + table(*_serving_rows(self.serving))
            )
        if self.exact:
            sections.append(
                "## Bit for bit\n\nThe tiny model completes stretches of this repository's Python greedily. R-ISD, and "
                "AR in batches, against AR of the base model without its adapter, one prompt at a time, in the same "
                "dtype and mode. The default mode promises no bits and reports no checksums.\n\n"
                + table(*_exact_rows(self.exact))
            )
        if self.conversions:
            sections.append(
                "## Conversions\n\nA parent from nothing on this machine's Python packages, and conversions of it, on "
                "held-out rows and prompts. Acceptance is teacher-forced, at temperature 1. Decoding is in bfloat16, "
                "where a tie may part ISD from AR.\n\n" + table(*_conversion_rows(self.conversions))
            )
        sections += self.notes
        if self.torch:
            sections.append(
                "## PyTorch on the same device, in a process of its own\n\n" + table(*_torch_rows(self.torch))
            )
        if self.candidates:
            winners = f"```python\n{self.tiles_entry}\n```" if self.tiles_entry else "No winner: nothing was timed."
            sections.append("## Tiles\n\n" + winners + "\n\n" + table(*_candidate_rows(self.candidates)))
        return "\n\n".join(sections)


def describe_environment(command: str) -> dict[str, str]:
    """What a figure means nothing without."""
    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "backend": device.client.platform_version.splitlines()[0],
        **versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": revision(),
        "command": command,
    }


def revision() -> str:
    """Commit of the checkout, `-dirty` if files differ from it, or "unknown" outside a checkout."""
    return _output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def default_folder(device_kind: str) -> Path:
    """`benchmarks/results/<date>-<kind>` of this checkout."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{slug}"


def _output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _check_rows(checks: list[Check]) -> tuple[list[str], list[list[str]]]:
    # Failures first: nobody reads a long table to its end.
    ordered = sorted(checks, key=lambda check: check.status != FAIL)
    rows = [
        [c.case, c.program, c.status, _figure(c.max_abs, "{:.2e}"), _figure(c.relative, "{:.2e}"), c.allowed, c.problem]
        for c in ordered
    ]
    return ["case", "program", "status", "max abs error", "relative error", "allowed", "problem"], rows


def _speed_rows(speeds: list[Speed]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for line in speeds:
        timing = line.timing
        rows.append(
            [
                line.case,
                line.program,
                _figure(timing and timing.median_s * 1e3, "{:.4f}"),
                _figure(timing and timing.iqr_s * 1e3, "{:.4f}"),
                _figure(line.gb_s, "{:.0f}"),
                _figure(line.tflop_s, "{:.1f}"),
                _figure(line.of_floor, "{:.0%}"),
                _figure(line.temp_bytes and line.temp_bytes / 2**20, "{:.1f}"),
                f"{line.sets} x {line.set_bytes / 2**20:.1f}" if line.sets else "",
                line.note,
            ]
        )
    header = ["case", "program", "median ms", "IQR ms", "GB/s", "TFLOP/s", "of floor", "temp MiB", "sets x MiB", "note"]
    return header, rows


def _step_rows(steps: "list[StepSpeed]") -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            step.case,
            f"{step.num_params / 1e9:.2f}",
            _figure(step.median_ms, "{:.1f}"),
            _figure(step.iqr_ms, "{:.1f}"),
            _figure(step.tokens_per_s, "{:,.0f}"),
            _figure(step.mfu, "{:.1%}"),
            _figure(step.peak_bytes and step.peak_bytes / 1e9, "{:.1f}"),
            _figure(step.loss, "{:.3f}"),
            step.note,
        ]
        for step in steps
    ]
    return ["case", "G params", "median ms", "IQR ms", "tokens/s", "MFU", "GB", "loss", "note"], rows


def _serving_rows(speeds: "list[ServeSpeed]") -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            speed.case,
            _figure(speed.median_ms, "{:.3f}"),
            _figure(speed.iqr_ms, "{:.3f}"),
            _figure(speed.break_even, "{:.2f}"),
            _figure(speed.trace_tokens_per_s, "{:,.0f}"),
            speed.note,
        ]
        for speed in speeds
    ]
    return ["case", "median ms", "IQR ms", "break-even TPF", "tokens/s at the trace's TPF (derived)", "note"], rows


def _exact_rows(lines: "list[ExactLine]") -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            line.case,
            f"{line.prompts:,}",
            f"{line.tokens:,}",
            f"{line.differing_tokens:,}",
            _figure(line.differing_checksums, "{:,}") or "-",
            f"{line.differing_prompts:,}",
            _figure(line.accepted / line.verified if line.verified else None, "{:.1%}"),
            line.note,
        ]
        for line in lines
    ]
    header = ["case", "prompts", "tokens", "differing tokens", "differing checksums", "prompts that differ"]
    return [*header, "drafts accepted", "note"], rows


def _conversion_rows(lines: "list[Conversion]") -> tuple[list[str], list[list[str]]]:
    rows = []
    for line in lines:
        depths = [value for name, value in sorted(line.heldout.items()) if name.startswith("acceptance/depth_")]
        rows.append(
            [
                line.case,
                f"{line.steps:,}",
                f"{line.tokens / 1e6:.1f}",
                _figure(line.ms_per_step, "{:.1f}"),
                _figure(line.heldout.get("ce_clean"), "{:.3f}"),
                _figure(line.heldout.get("acceptance"), "{:.3f}"),
                " ".join(f"{value:.3f}" for value in depths),
                "; ".join(f"{name} {value:.4g}" for name, value in line.tokens_per_forward.items()),
                line.note,
            ]
        )
    header = ["case", "steps", "M tokens", "ms/step", "clean loss", "acceptance", "by depth", "TPF", "note"]
    return header, rows


def _torch_rows(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(line.get("case", "")),
            str(line.get("program", "")),
            _figure(line.get("median_ms"), "{:.4f}"),
            _figure(line.get("iqr_ms"), "{:.4f}"),
            str(line.get("note", "")),
        ]
        for line in lines
    ]
    return ["case", "program", "median ms", "IQR ms", "note"], rows


def _candidate_rows(candidates: list[Candidate]) -> tuple[list[str], list[list[str]]]:
    ordered = sorted(candidates, key=lambda c: (c.case, c.place, c.timing.median_s if c.timing else float("inf")))
    rows = [
        [c.case, c.place, c.tiles, _figure(c.timing and c.timing.median_s * 1e3, "{:.4f}"), c.note] for c in ordered
    ]
    return ["case", "place", "tiles", "median ms", "note"], rows


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
