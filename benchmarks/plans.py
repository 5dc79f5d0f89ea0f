"""`make plans`: every config of a Qwen3 size against the devices it is meant for -> benchmarks/results/plans.md.

Compiled, not measured: bytes are the compiler's, times are bounds from published peaks (`train.plan`). The table is
written after every line; a target that is not asked for keeps the line it has.
"""

import platform
import sys
from datetime import date
from pathlib import Path

import jax

from train.config import load_config
from train.plan import Plan, make_plan

RESULT = Path("benchmarks/results/plans.md")
LORA = ["lora.rank=128", "lora.alpha=256", "param_dtype=bfloat16", "learning_rate=2e-4", "curriculum=[]"]
# One row of 4,096 tokens a device, until a step has 4 million tokens; then fewer rows than devices, each cut over four.
SCALING: list[tuple[str, str, list[str]]] = [
    (config, target, ["gradient_accumulation_steps=1", f"batch_size={rows}", *mesh])
    for config in ("qwen3_8b", "qwen3_32b")
    for target, rows, mesh in (
        ("h200x64", 64, []),
        ("h200x512", 512, ["mesh.data=8"]),
        ("h200x4096", 1024, ["mesh.data=16", "mesh.context=4"]),
        ("v5p-1024", 512, ["mesh.data=4"]),
        ("v5p-8192", 1024, ["mesh.data=8", "mesh.context=4"]),
    )
]
# config, target, overrides
PLANS: list[tuple[str, str, list[str]]] = [
    ("qwen3_0p6b", "h100x1", ["gradient_accumulation_steps=8"]),
    ("qwen3_0p6b", "h100x8", []),
    ("qwen3_0p6b", "v5e-16", []),
    ("qwen3_1p7b", "h100x8", []),
    ("qwen3_1p7b", "v5e-16", []),
    ("qwen3_4b", "h100x8", []),
    ("qwen3_4b", "v6e-32", ["gradient_accumulation_steps=1"]),
    ("qwen3_8b", "h100x8", []),
    ("qwen3_8b", "h200x8", ["gradient_accumulation_steps=1"]),
    ("qwen3_8b", "v6e-32", ["gradient_accumulation_steps=1"]),
    ("qwen3_8b", "v5p-64", ["gradient_accumulation_steps=1"]),
    ("qwen3_8b", "h200x1", [*LORA, "gradient_accumulation_steps=32"]),
    (
        "qwen3_8b",
        "h200x8",
        ["dataset.build.max_seq_len=32768", "batch_size=4", "mesh.context=4", "gradient_accumulation_steps=2"],
    ),
    ("qwen3_14b", "h200x8", []),
    ("qwen3_14b", "v5p-64", ["gradient_accumulation_steps=1"]),
    ("qwen3_32b", "h200x8", []),
    ("qwen3_32b", "h100x16", ["gradient_accumulation_steps=2"]),
    ("qwen3_32b", "v5p-128", ["gradient_accumulation_steps=1", "mesh.tensor=2"]),
    *SCALING,
]
HEADER = """\
# Plans

Compiled for devices that were not there (`make plans`); nothing ran. GB a device are the compiler's account of a step
(the rest: gradients, activations). "sent" is what a device sends in a step if every collective is a ring, read from the
compiled program with its loops. "compute" is arithmetic at the published bfloat16 peak, recomputation included; "links"
is what is sent at the peak of the interconnect, of GPUs NVLink, so across their hosts it takes longer. A full row
counts as one document.

| config | target | overrides | mesh | parameters | optimizer | rest | memory | sent | compute | links | 40% MFU | |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> int:
    """Plans all, or the lines that match a word of the command line; 1 when something does not fit."""
    words = sys.argv[1:]
    lines = _read()
    is_good = True
    for config_name, target, overrides in PLANS:
        key = f"| {config_name} | {target} | {' '.join(overrides)} |"
        if words and not any(word in key for word in words):
            continue
        try:
            plan = make_plan(load_config(f"configs/{config_name}.yaml", overrides), target)
            is_good &= plan.fits
            lines[key] = _line(plan)
        except (RuntimeError, ValueError) as error:
            is_good = False
            lines[key] = f" failed: {str(error).splitlines()[0][:160]} ||||||||||"
        print(key, lines[key], flush=True)
        _write(lines)
    return not is_good


def _line(plan: Plan) -> str:
    assert plan.device is not None  # every named target is in the table of devices
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    parts = [f"{size / 1e9:.2f} GB" for size in (plan.param_bytes, plan.optimizer_bytes, plan.temporary_bytes)]
    share = plan.bytes_per_device / plan.device.memory
    verdict = "fits" if plan.fits else "**does not fit**"
    at_40 = plan.seconds_at(0.4)
    return (
        f" {mesh} | {' | '.join(parts)} | {share:.0%} | {plan.sent_bytes / 1e9:.2f} GB | "
        f"{plan.compute_s:.3g} s | {plan.links_s:.3g} s | {at_40:.3g} s | {verdict} |"
    )


def _read() -> dict[str, str]:
    if not RESULT.exists():
        return {}
    found = {}
    for line in RESULT.read_text(encoding="utf-8").splitlines():
        if line.startswith("| qwen3"):
            cells = line.split("|")
            found["|".join(cells[:4]) + "|"] = "|".join(cells[4:])
    return found


def _write(lines: dict[str, str]) -> None:
    ordered = [f"| {config} | {target} | {' '.join(overrides)} |" for config, target, overrides in PLANS]
    table = "".join(f"{key}{lines[key]}\n" for key in ordered if key in lines)
    footer = f"\nCompiled {date.today().isoformat()}, Python {platform.python_version()}, jax {jax.__version__}.\n"
    RESULT.write_text(HEADER + table + footer, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
