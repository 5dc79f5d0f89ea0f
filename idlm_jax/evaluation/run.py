"""One benchmark after the other. What is finished is on disk and is not run again; an interrupted one goes on.

output/run.json             what was asked of the whole run; a later call must ask the same
output/NAME/result.json     a finished benchmark; its presence is what "finished" means
output/NAME/harness.log     what its harness printed
output/NAME/answers, raw/   the harness's own files; answers that are there are not asked for again
output/NAME/inside/         of a benchmark that executes programs: all that the sandbox can write
output/summary.{md,json}    the table (`summary`)
"""

import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from idlm_jax.evaluation import evalscope, lm_eval
from idlm_jax.evaluation.counters import read_counters
from idlm_jax.evaluation.harness import HarnessFailed, Options, Score, Target
from idlm_jax.evaluation.sandbox import PORT, Limits, sandboxed
from idlm_jax.evaluation.suite import Benchmark, Suite

POLL_S = 0.5
STOP_TIMEOUT_S = 10.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A finished benchmark, as in `result.json`.

    Attributes:
        name: of the benchmark.
        percent: the score, 0 to 100.
        stderr_percent: of it, None if the harness gives none.
        num_samples: questions, None if the harness does not say.
        tokens_per_forward: of the server meanwhile; None from other servers.
        acceptance_rate: share of drafts kept, likewise.
        num_tokens: committed by the server meanwhile, likewise.
        seconds: that this call took; less than the whole after an interruption.
        harness: name and version.
        task: the harness's name for it.
        metric: of the harness; empty for its primary one.
        sandbox: where generated programs ran; None if there were none.
        ended: date and time, UTC.
    """

    name: str
    percent: float
    stderr_percent: float | None
    num_samples: int | None
    tokens_per_forward: float | None
    acceptance_rate: float | None
    num_tokens: int | None
    seconds: float
    harness: str
    task: str
    metric: str
    sandbox: Literal["isolated", "limits only"] | None
    ended: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is run, with what, and where to.

    Attributes:
        suite: sampling and benchmarks.
        target: the server.
        options: limit, concurrency, seed, timeout.
        programs: of the harnesses that are needed, by name.
        folder: output.
        limits: of generated programs.
        is_isolated: generated programs have no network and can write in their folder alone.
    """

    suite: Suite
    target: Target
    options: Options
    programs: Mapping[str, Path]
    folder: Path
    limits: Limits
    is_isolated: bool

    def asked(self) -> dict[str, Any]:
        """What decides the scores, for `run.json`."""
        target = {"model": self.target.model, "server_flags": list(self.target.flags)}
        asked = {"suite": self.suite.name, "api": self.suite.api, **target}
        sampling = self.suite.sampling.model_dump()
        return asked | sampling | {"limit": self.options.limit, "seed": self.options.seed}


def run_benchmarks(run: Run, benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """Runs what is not finished, and says for each that failed why.

    Raises:
        ValueError: the folder holds a run of something else.
        KeyboardInterrupt: Ctrl-C; the harness was stopped, and the same call goes on.
    """
    claim(run)
    failures: dict[str, str] = {}
    todo = [each for each in benchmarks if read_result(run.folder, each) is None]
    is_watched = sys.stderr.isatty()  # else a line per benchmark is enough
    with tqdm(total=len(benchmarks), initial=len(benchmarks) - len(todo), unit="benchmark") as bar:
        for benchmark in todo:
            bar.set_description(benchmark.title)
            try:
                result = _run_one(run, benchmark, show=lambda line: bar.set_postfix_str(line[-60:], refresh=is_watched))
            except (HarnessFailed, OSError) as error:
                failures[benchmark.name] = str(error)
                bar.write(f"{benchmark.title} failed: {error}")
            else:
                _write(run.folder / benchmark.name / "result.json", dataclasses.asdict(result))
            bar.update()
    return failures


def claim(run: Run) -> None:
    """Writes `run.json`, or checks that the one there asks the same.

    Raises:
        ValueError: it does not.
    """
    file = run.folder / "run.json"
    if not file.exists():
        _write(file, run.asked())
        return
    there, here = json.loads(file.read_text()), run.asked()
    if different := [name for name in here if there.get(name) != here[name]]:
        said = ", ".join(f"{name} {there.get(name)!r} (now {here[name]!r})" for name in different)
        raise ValueError(f"{run.folder} holds a run with {said}: give another --output")


def read_result(folder: Path, benchmark: Benchmark) -> Result | None:
    """The result of a finished benchmark, None of any other.

    Raises:
        ValueError: the file is not one that this program wrote.
    """
    file = folder / benchmark.name / "result.json"
    if not file.exists():
        return None
    try:
        return Result(**json.loads(file.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no result: {error}") from None


def _run_one(run: Run, benchmark: Benchmark, show: Callable[[str], None]) -> Result:
    folder = (run.folder / benchmark.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    before = read_counters(run.target.url, run.target.api_key)
    if benchmark.runs_code:
        score = _run_sandboxed(run, benchmark, folder, show)
    elif benchmark.harness == "evalscope":
        program = run.programs["evalscope"]
        command = evalscope.command(program, run.suite, benchmark, run.target, run.options, folder)
        _call(command, folder, {**os.environ, **evalscope.environment(folder)}, show)
        score = evalscope.read_score(program, benchmark, folder)
    else:
        command = lm_eval.command(run.programs["lm_eval"], run.suite, benchmark, run.target, run.options, folder)
        _call(command, folder, {**os.environ, **lm_eval.environment(run.target)}, show)
        score = lm_eval.read_score(benchmark, folder)
    after = read_counters(run.target.url, run.target.api_key)
    spent = after - before if after is not None and before is not None else None
    return Result(
        name=benchmark.name,
        percent=score.percent,
        stderr_percent=score.stderr_percent,
        num_samples=score.num_samples,
        tokens_per_forward=None if spent is None else spent.tokens_per_forward,
        acceptance_rate=None if spent is None else spent.acceptance_rate,
        num_tokens=None if spent is None else spent.tokens,
        seconds=round(time.monotonic() - began, 1),
        harness=score.version,
        task=benchmark.task,
        metric=benchmark.metric,
        sandbox=None if not benchmark.runs_code else "isolated" if run.is_isolated else "limits only",
        ended=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _run_sandboxed(run: Run, benchmark: Benchmark, folder: Path, show: Callable[[str], None]) -> Score:
    """evalscope, and with it the programs that the model writes, in the sandbox; the data set is fetched before.

    What can be written from inside is `folder/inside`, into which this program writes nothing afterwards: a link laid
    there would lead it elsewhere.
    """
    inside = folder / "inside"
    program, environment = run.programs["evalscope"], evalscope.environment(inside)
    address = urlsplit(run.target.url)
    assert address.hostname is not None  # checked with the URL
    if not (folder / "fetched").exists():
        _call(evalscope.prefetch_command(program, benchmark, folder), folder, {**os.environ, **environment}, show)
        (folder / "fetched").touch()
    target = run.target
    if run.is_isolated:
        target = dataclasses.replace(target, url=f"http://127.0.0.1:{PORT}{address.path}")
    command = evalscope.command(program, run.suite, benchmark, target, run.options, inside)
    log = folder / "harness.log"
    with (
        log.open("ab") as output,
        sandboxed(
            command,
            (address.hostname, address.port or 80),
            inside,
            environment={**environment, **evalscope.offline_environment()},
            limits=run.limits,
            is_isolated=run.is_isolated,
            output=output,
        ) as process,
    ):
        _wait(process, log, show)
    return evalscope.read_score(program, benchmark, inside)


def _call(command: list[str], folder: Path, environment: Mapping[str, str], show: Callable[[str], None]) -> None:
    log = folder / "harness.log"
    with log.open("ab") as output:
        # In a session of its own: Ctrl-C in the terminal is for this program, which then stops the harness.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            _wait(process, log, show)
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], log: Path, show: Callable[[str], None]) -> None:
    """Waits for the end, showing the last line of the log.

    Raises:
        HarnessFailed: it did not end with 0.
    """
    while True:
        try:
            code = process.wait(POLL_S)
            break
        except subprocess.TimeoutExpired:
            show(last_words(log))
    if code != 0:
        raise HarnessFailed(f"its harness ended with {code}: {last_words(log)} ({log})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the harness and what it started, if it has not ended by itself."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(log: Path) -> str:
    """The last line that is not empty; a progress bar's is its newest state."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((text for line in reversed(lines) if (text := _COLOUR.sub("", line).strip())), "it has printed nothing")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, file)
