"""The server on this machine under load: AR, ISD at fixed strides, and the stride that it chooses, by callers at once.

`serve.bench` starts a server per method on the same device, lets callers take turns on them, and writes `load_<case>/`
with its report, its JSON and its plot. The model is the conversion that `convert` left here, else the tiny one of
`assets/`.
"""

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.convert import RUNS

ROOT = Path(__file__).parents[2]
CONVERTED = (RUNS / "parent" / "hf", RUNS / "adapter_ours" / "adapter")
TINY = (ROOT / "assets" / "tiny-qwen3-py", ROOT / "assets" / "tiny-qwen3-py-isd")
NEEDS_S, REPORT_S = 120.0, 20.0  # of a case, and to write what was finished when the time is up
PROMPT_CHARACTERS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadCase:
    """One sweep.

    Attributes:
        name: of the case.
        strides: as `serve.bench --strides` takes them; the last is what ratios are to.
        concurrency: callers at once.
        num_prompts: requests of each load, method and round.
        rounds: counted ones.
        max_tokens: of a completion.
        is_dry: on a CPU; requests are a handful.
    """

    name: str
    strides: str = "4,4r7,4x4,auto,1"
    concurrency: str = "1,4,8,16,32,64"
    num_prompts: int = 128
    rounds: int = 2
    max_tokens: int = 64
    is_dry: bool = False


CASES = (LoadCase(name="greedy"),)
DRY = (LoadCase(name="tiny", strides="2,1", concurrency="1", num_prompts=4, rounds=1, max_tokens=4, is_dry=True),)


def put_load(cases: Sequence[LoadCase], folder: Path, budget: Budget) -> Iterator[str]:
    """Runs case after case, and yields a line on each: where its report is, or why there is none."""
    for case in cases:
        if not case.is_dry and not budget.allows(NEEDS_S):
            yield f"{case.name}: {SKIPPED}"
            continue
        out = folder / f"load_{case.name}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        prompts = out / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in _texts(case)))
        try:
            status = _run(_command(case, prompts, out), budget.left_s - REPORT_S)
        finally:
            prompts.unlink()
        has_report = (out / "report.md").exists()
        yield f"{case.name}: exit status {status}, " + (f"`{out.name}/report.md`" if has_report else "no report")


def _command(case: LoadCase, prompts: Path, out: Path) -> list[str]:
    model, adapter = CONVERTED if all(path.is_dir() for path in CONVERTED) and not case.is_dry else TINY
    most = max(int(each) for each in case.concurrency.split(","))
    context = 256
    server = {"--max-running-requests": most, "--context-length": context, "--dtype": "bfloat16"}
    server["--max-total-tokens"] = 2 * most * context  # several servers share the memory
    options = {
        "--model-path": model.relative_to(ROOT),
        "--adapter": adapter.relative_to(ROOT),
        "--strides": case.strides,
        "--serve-args": shlex.join(["--no-extras", *(str(word) for pair in server.items() for word in pair)]),
        "--prompts": prompts,
        "--concurrency": case.concurrency,
        "--num-prompts": case.num_prompts,
        "--rounds": case.rounds,
        "--max-tokens": case.max_tokens,
        "--out": out,
    }
    return [sys.executable, "-m", "serve.bench", *(str(word) for pair in options.items() for word in pair)]


def _texts(case: LoadCase) -> list[str]:
    """Places of this repository's own Python."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "idlm_jax").rglob("*.py")))
    count = case.num_prompts * case.rounds
    return [text[at : at + PROMPT_CHARACTERS] for at in range(0, len(text), len(text) // count)][:count]


def _run(command: Sequence[str], seconds: float) -> int:
    """Exit status; after so many seconds it is asked to end, and reports what it has."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(REPORT_S)
    finally:
        process.kill()
