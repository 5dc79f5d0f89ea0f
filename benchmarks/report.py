"""docs/results.md from the committed results: every table as its benchmark wrote it, and what was aimed at.

python -m benchmarks.report    # `make report`; measures nothing
"""

from pathlib import Path
from typing import NamedTuple

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/results.md")

INTRODUCTION = """\
# Results

Written by `make report` from `benchmarks/results/`; each table names its command, date, device and versions. Everything
here was measured on two CPU cores with the tiny model of `assets/` (3 million parameters): tokens per forward,
acceptance and identity are properties of model and method, times are ratios on a CPU. **No accelerator has run any of
it yet**; what the compilers say about H200 and TPU is in [kernels.md](kernels.md#compiled-here-measured-there)
and [plans](../benchmarks/results/plans.md), apart from what was measured. The server under load is in
[bench_serving.md](bench_serving.md), training recipes are in [recipes.md](recipes.md).
"""


class Section(NamedTuple):
    """One table of the page.

    Attributes:
        title: heading.
        table: file under `benchmarks/results`, whose own heading is left out.
        text: what was aimed at and what to read in it.
    """

    title: str
    table: str
    text: str


SECTIONS = (
    Section(
        "Drafting rules",
        "branches/tiny-cpu.md",
        "Aim: +15 % tokens per forward over the official rule at N=4 and +30 % at N=8, and 70 % of full branching's "
        "gain for at most half of its extra rows. Met at N=4 with full branches; two placed branches give 76 % to 84 % "
        "of that gain for 28 % of its extra rows or fewer. Missed at N=8 (+19 %): the tiny adapter is trained for N=4, "
        "and drafts beyond the third are seldom reached ([0012](decisions/0012-branches.md)).",
    ),
    Section(
        "What coupling costs",
        "branches/coupled-cpu.md",
        "Coupled verification says AR's own text for every seed and accepts a little less "
        "([0017](decisions/0017-coupled-and-auto.md)).",
    ),
    Section(
        "Load-aware stride",
        "load_aware/tiny-cpu.md",
        "Aim: within 2 % of the best fixed method at every load, and never below AR. AR is the best on a CPU at every "
        "load; met from 2 to 32 callers, within the interval at 1 (0.97), missed at 64 (0.93) "
        "([0017](decisions/0017-coupled-and-auto.md)).",
    ),
    Section(
        "Consistency",
        "measure/tiny-cpu.md",
        "What `idlm measure` says: acceptance by depth, and the tokens per forward that it predicts, to be compared "
        "with those counted ([measuring.md](measuring.md)).",
    ),
    Section(
        "Bit for bit",
        "bitwise/tiny-cpu.md",
        "Aim: no differing token and no differing logit bit ([0013](decisions/0013-bitwise.md)).",
    ),
    Section(
        "8-bit weights",
        "quantized/tiny-cpu.md",
        "What they cost in quality ([0014](decisions/0014-eight-bit-weights.md)).",
    ),
    Section(
        "Drafts after a correction",
        "drafts/tiny-cpu.md",
        "Where drafts are worse, and why training for it did not pay ([0016](decisions/0016-on-policy.md)).",
    ),
)


def page(results: Path = RESULTS) -> str:
    """The page.

    Raises:
        FileNotFoundError: a table is not there.
    """
    parts = [INTRODUCTION]
    for section in SECTIONS:
        heading, _, body = (results / section.table).read_text(encoding="utf-8").partition("\n")
        if not heading.startswith("# "):
            raise ValueError(f"{section.table} does not begin with a heading")
        parts.append(f"## {section.title}\n\n{section.text}\n\n{body.strip()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
