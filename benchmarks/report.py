"""docs/results.md from the committed results: every table as its benchmark wrote it, and what was aimed at.

python -m benchmarks.report             # `make results`: measures nothing
python -m benchmarks.report --measure   # `make report`: half an hour on two cores
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from tqdm import tqdm

from benchmarks import device_results

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/results.md")

INTRODUCTION = """\
# Results

Written by `make report`; each table names its command, date, device and versions. First what accelerators measured;
then what was measured on two CPU cores with the tiny model of `assets/` (3 million parameters): tokens per forward,
acceptance and identity are properties of model and method, times are ratios on a CPU. What the compilers
say about H200 and TPU is in [kernels.md](kernels.md#compiled-here-measured-there) and
[plans](../benchmarks/results/plans.md), apart from what was measured. The server under load is in
[bench_serving.md](bench_serving.md), training recipes are in [recipes.md](recipes.md).

`make report` measures again what takes minutes, and reads the rest as it was committed: trainings, the load sweep,
which wants an idle machine, and the proof of the bit-for-bit mode have commands of their own. `make results` writes
this page and measures nothing.
"""


class Section(NamedTuple):
    """One table of the page.

    Attributes:
        title: heading.
        table: file under `benchmarks/results`, whose own heading is left out.
        text: what was aimed at and what to read in it.
        command: writes the table, in minutes; None where it takes longer.
        until: line before which the table's file is cut off.
    """

    title: str
    table: str
    text: str
    command: str | None = None
    until: str | None = None


MEASURE = (
    "idlm measure assets/tiny-qwen3-py --adapter assets/tiny-qwen3-py-isd --dataset stdlib=runs/data/stdlib_256_lora "
    "--prompts prose=benchmarks/prompts/prose.jsonl --strides 2,4 --branches 1,full --rows 7,11 --num-prompts 48 "
    "--max-tokens 48 --ignore-eos --output benchmarks/results/measure/tiny-cpu.json --markdown "
    "benchmarks/results/measure/tiny-cpu.md --plot benchmarks/results/measure/tiny-cpu.png"
)
# Held-out rows and prompts of the tiny model's own corpus; the training step that comes with it is thrown away.
DATASET = Path("runs/data/stdlib_256_lora")
BUILD = "python -m train configs/tiny_lora_cpu.yaml steps=1 output_dir=runs/build"

SECTIONS = (
    Section(
        "Drafting rules",
        "branches/tiny-cpu.md",
        "Aim: +15 % tokens per forward over the official rule at N=4 and +30 % at N=8, and 70 % of full branching's "
        "gain for at most half of its extra rows. At T=0, with the adapter's Markov head under every rule: +22 % at "
        "N=4 and +30 % at N=8 with full branches; with MASKs placed one by one, 11 rows at N=4 give 79 % of that gain "
        "for 39 % of the extra rows, and in the rows of one group there is +10 % at N=4 and +21 % at N=8. At T=1 full "
        "branches gain 9 % and 8 %, placed MASKs up to 5 %: the official rule, which does not sample from the model "
        "there, gains more from likely drafts ([0012](decisions/0012-branches.md)). Coupled verification says AR's "
        'own text for every seed and accepts a little less; "auto" is AR wherever AR is faster '
        "([0017](decisions/0017-coupled-and-auto.md)).",
        "python -m benchmarks.branches",
    ),
    Section(
        "The Markov head",
        "markov/tiny-cpu.md",
        "Each draft corrected by the draft before it ([0019](decisions/0019-markov-head.md)): with full branches +51 % "
        "tokens per forward over the official rule at N=4 and +64 % at N=8 (T=0; at T=1 +43 % and +51 %), where the "
        "official rule has an adapter trained on the same rows without a head. With the head under both, full branches "
        "are 1.22 and 1.30 times as fast as the official rule (T=0), and MASKs placed in its own rows 1.10 and 1.21 "
        "times. At T=1 full branches are 1.09 and 1.08 times as fast: told the draft before, the official rule "
        "accepts still more of what AR would not have drawn. Every greedy token is AR's.",
    ),
    Section(
        "Load-aware stride",
        "load_aware/tiny-cpu.md",
        'Aim: "auto" within 2 % of the best fixed setting at every number of callers, and never below AR. On two CPU '
        "cores AR and N=2 are level within the noise of timed turns, which is larger than the aim: every interval of "
        '"auto" over the best holds 1. By the decode steps of its own turns "auto" is 2 % below AR with one caller, '
        "where choosing takes as much, level at 16 to 64, and ahead between; at 8 the two ways of counting do not "
        "agree. Shares and decode steps of this run hold an eighth of the next turn, mostly of AR "
        "([0017](decisions/0017-coupled-and-auto.md)).",
    ),
    Section(
        "Consistency",
        "measure/tiny-cpu.md",
        "What `idlm measure` says: acceptance by depth, and the tokens per forward that it predicts, to be compared "
        "with those counted ([measuring.md](measuring.md)).",
        MEASURE,
    ),
    Section(
        "The story's systems",
        "story/tiny-cpu.md",
        "What each way of training makes of the same base on the same rows (three seeds). As found: drafts of "
        "introspective training agree with their check more often than those "
        "of block diffusion, and the more the farther ahead. It alone decodes faster than AR while its text stays "
        "close to AR's by the base model's judgement; at this size block diffusion, with a forward to commit each "
        "block, is slower than AR or level. At temperature 1 the official rule's text is more likely under the base "
        "than the model's own samples, which is what a rule that prefers likely drafts does.",
    ),
    Section(
        "AR, ISD and what it is compared with, by callers",
        "serve/baselines/report.md",
        "One server each, from one base (`python -m benchmarks.serving`, a quarter of an hour; latencies are in "
        "[its report](../benchmarks/results/serve/baselines/report.md)). On a CPU, which pays for every row, AR is "
        "fastest at every load; tokens per forward do not depend on the machine.",
        until="## Latency in ms, over requests",
    ),
    Section(
        "Bit for bit",
        "bitwise/tiny-cpu.md",
        "Aim: no differing token and no differing logit bit ([0013](decisions/0013-bitwise.md)): none of 161,280 "
        "tokens in 18 settings.",
    ),
    Section(
        "8-bit weights",
        "quantized/tiny-cpu.md",
        "What they cost in quality ([0014](decisions/0014-eight-bit-weights.md)).",
        "python -m benchmarks.quantized",
    ),
    Section(
        "Drafts after a correction",
        "drafts/tiny-cpu.md",
        "Where drafts are worse, and why training for it did not pay ([0016](decisions/0016-on-policy.md)).",
        "python -m benchmarks.drafts",
    ),
    Section(
        "Scaling plans",
        "plans.md",
        "What a training step of each size holds, sends and computes on devices that were not there: compiled ahead of "
        "time, never run (`make plans`).",
    ),
)


def page(results: Path = RESULTS) -> str:
    """The page.

    Raises:
        FileNotFoundError: a table is not there.
    """
    parts = [INTRODUCTION, device_results.section(results)]
    for section in SECTIONS:
        heading, _, body = (results / section.table).read_text(encoding="utf-8").partition("\n")
        if not heading.startswith("# "):
            raise ValueError(f"{section.table} does not begin with a heading")
        if section.until is not None:
            body = body[: body.index(f"\n{section.until}\n")]
        body = body.strip().replace("\n## ", "\n### ")
        parts.append(f"## {section.title}\n\n{section.text}\n\n{body}\n")
    return "\n".join(parts)


def measure() -> None:
    """Runs every command of a section.

    Raises:
        subprocess.CalledProcessError: one failed; the tables of those before it are written.
    """
    commands = ([] if DATASET.exists() else [BUILD]) + [each.command for each in SECTIONS if each.command is not None]
    for command in tqdm([*commands, "python -m benchmarks.pictures"], unit="command"):
        tqdm.write(f"$ {command}")
        program, *arguments = shlex.split(command)
        subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True)


def main(
    anew: Annotated[bool, typer.Option("--measure", help="Run first what takes minutes: half an hour in all.")] = False,
) -> None:
    """Writes docs/results.md from benchmarks/results/."""
    if anew:
        measure()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    typer.run(main)
