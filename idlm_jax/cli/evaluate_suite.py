"""`idlm eval --suite`: public benchmarks through a server, and the table of them."""

import contextlib
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import pydantic
import typer
from rich.console import Console

from idlm_jax.cli.checkout import CHECKOUT, import_from_checkout
from idlm_jax.evaluation import evalscope, lm_eval
from idlm_jax.evaluation.harness import Options, Target, find_program
from idlm_jax.evaluation.run import Run, read_result, run_benchmarks
from idlm_jax.evaluation.sandbox import Limits, why_not_isolated
from idlm_jax.evaluation.suite import Benchmark, Suite, load_suite
from idlm_jax.evaluation.summary import Row, as_table, read_published, write_summary

ENDED_BY_HAND = 130
PIPE_WIDTH = 150


def evaluate_suite(
    suite: Annotated[str, typer.Option(help="idlm15, or a YAML file of your own (docs/evaluation.md).")],
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id: start this project's server with it, and stop it after.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Instead of MODEL: a server that runs already, up to and with /v1.")
    ] = None,
    served_model: Annotated[str | None, typer.Option(help="By default the one model that /v1/models names.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="With MODEL: folder of a gated LoRA adapter (R-ISD).")] = None,
    stride: Annotated[
        str, typer.Option(help="With MODEL: 1 is plain AR, 4x2 has two branches, 8r15 15 rows, or auto.")
    ] = "4",
    serve_args: Annotated[str, typer.Option(help='With MODEL: for the server, as in "--tp-size 4".')] = "",
    start_timeout: Annotated[float, typer.Option(help="Seconds a started server may load and compile.")] = 1800,
    tasks: Annotated[str | None, typer.Option(help="Some of the suite, as in gsm8k,math500. Default: all.")] = None,
    limit: Annotated[int | None, typer.Option(help="First questions of each benchmark or subset only.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default runs/eval/SUITE. A second call goes on.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    temperature: Annotated[float | None, typer.Option(help="Instead of the suite's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer with its thoughts.")] = None,
    seed: Annotated[int, typer.Option(help="Of every request's sampling.", min=0)] = 1234,
    timeout: Annotated[int, typer.Option(help="Seconds until a request counts as failed.", min=1)] = 7200,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Also run benchmarks that execute what the model wrote.")
    ] = False,
    without_isolation: Annotated[
        bool, typer.Option("--without-isolation", help="Execute it with network and file system, under limits alone.")
    ] = False,
    code_memory_gb: Annotated[float, typer.Option(help="Address space of each such process.", min=0.5)] = 8.0,
    lm_eval_program: Annotated[Path | None, typer.Option("--lm-eval", help="Program, if not in .venv-eval.")] = None,
    evalscope_program: Annotated[
        Path | None, typer.Option("--evalscope", help="Program, if not in .venv-evalscope.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="IDLM_API_KEY", help="Sent to the server.")] = None,
) -> None:
    """Runs public benchmarks through an OpenAI-compatible server and shows them beside published figures.

    The harnesses are lm-eval and evalscope, each in an environment of its own (`make harnesses`). Finished benchmarks
    are kept; after Ctrl-C or a failure the same command goes on.

        idlm eval --suite idlm15 yifanyu/I-DLM-8B --tasks gsm8k,math500

        idlm eval --suite idlm15 --url http://127.0.0.1:30000/v1 --limit 20

    Exits with 0 if all chosen benchmarks have a score, 1 if one failed, 2 if nothing could be run, 130 after Ctrl-C.
    """
    chosen_suite = _with_sampling(load_suite(suite), temperature=temperature, max_tokens=max_tokens)
    if (model is None) == (url is None):
        raise ValueError("give either MODEL, to start a server with it, or --url of one that runs")
    if url is not None:
        if adapter or serve_args:
            raise ValueError("--adapter and --serve-args belong to MODEL")
        url = _checked(url)
    asked = chosen_suite.choose(None if tasks is None else tasks.split(","))
    why = {each.name: reason for each in asked if (reason := _why_not(each, allow_code_execution))}
    todo = [each for each in asked if each.name not in why]
    if not todo:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in why.items()))
    programs = {}
    if any(each.harness == "lm_eval" for each in todo):
        programs["lm_eval"] = find_program("lm_eval", lm_eval_program, CHECKOUT / ".venv-eval", lm_eval.INSTALL)
    if any(each.harness == "evalscope" for each in todo):
        folder = CHECKOUT / ".venv-evalscope"
        programs["evalscope"] = find_program("evalscope", evalscope_program, folder, evalscope.INSTALL)
    if any(each.runs_code for each in todo) and not without_isolation:
        _check_isolation(url)
    folder = output or Path("runs") / "eval" / chosen_suite.name
    folder.mkdir(parents=True, exist_ok=True)
    published = read_published()
    with _sigterm_as_ctrl_c(), contextlib.ExitStack() as stack:
        flags: list[str] = []
        if model is not None:
            flags = ["--model-path", model, *(["--adapter", str(adapter)] if adapter else []), *shlex.split(serve_args)]
            url = stack.enter_context(_started(stride, flags, folder, api_key, start_timeout))
            flags += ["--stride", stride]
        assert url is not None
        client: Any = import_from_checkout("serve.bench.client")
        endpoint = client.Endpoint("the server", url)
        found = served_model or client.find_model(endpoint, api_key)
        run = Run(
            suite=chosen_suite,
            target=Target(url=url, model=found, api_key=api_key, flags=tuple(flags)),
            options=Options(limit=limit, concurrency=concurrency, seed=seed, timeout_s=timeout),
            programs={name: program.absolute() for name, program in programs.items()},
            folder=folder,
            limits=Limits(memory_bytes=int(code_memory_gb * (1 << 30))),
            is_isolated=not without_isolation,
        )
        server = client.server_info(endpoint, api_key)
        was_interrupted = False
        try:
            why |= run_benchmarks(run, todo)
        except KeyboardInterrupt:
            was_interrupted = True
            why |= {each.name: "interrupted" for each in todo}
    rows = []
    for each in chosen_suite.benchmarks:
        result = read_result(folder, each)
        rows.append(Row(each, result, "" if result else why.get(each.name, "not asked for")))
    write_summary(folder, run, rows, published, server)
    console = Console()
    # A pipe or a file has no width of its own.
    console.print(as_table(run, rows, published), width=None if console.is_terminal else PIPE_WIDTH)
    for row in rows:
        if row.benchmark in asked and row.why:
            print(f"{row.benchmark.title}: {row.why}")
    print(f"written: {folder}/summary.md and summary.json")
    if was_interrupted:
        print("interrupted: the same command goes on")
        raise typer.Exit(ENDED_BY_HAND)
    if any(row.result is None for row in rows if row.benchmark in todo):
        raise typer.Exit(1)


def _with_sampling(suite: Suite, **instead: float | int | None) -> Suite:
    """The suite with some of its sampling replaced, checked like the file's."""
    changed = {name: value for name, value in instead.items() if value is not None}
    try:
        return Suite.model_validate(suite.model_dump() | {"sampling": suite.sampling.model_dump() | changed})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{str(first['loc'][-1]).replace('_', '-')}: {first['msg']}") from None


def _why_not(benchmark: Benchmark, may_execute: bool) -> str | None:
    """What keeps a benchmark from being run, None if nothing does."""
    if benchmark.harness is None:
        return benchmark.note or "no harness has it"
    if benchmark.runs_code and not may_execute:
        return "it executes programs that the model writes: --allow-code-execution"
    return None


def _checked(url: str) -> str:
    parts = urlsplit(url.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url {url!r} must be as in http://127.0.0.1:30000/v1")
    return parts.geturl()


def _check_isolation(url: str | None) -> None:
    """Raises ValueError unless programs can be isolated here, and the server reached from inside."""
    if url is not None and urlsplit(url).scheme != "http":
        raise ValueError("benchmarks that execute programs reach http:// servers only: the sandbox relays plain TCP")
    if reason := why_not_isolated():
        raise ValueError(
            f"programs that the model writes cannot be isolated here ({reason}); in a container or a virtual machine "
            "that you can lose, --without-isolation runs them under limits alone"
        )


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Whoever ends this program by SIGTERM ends the server and the harness that it started too."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _started(stride: str, flags: list[str], folder: Path, api_key: str | None, timeout_s: float) -> Iterator[str]:
    """A server of this project, until the block ends; yields its URL."""
    servers: Any = import_from_checkout("serve.bench.servers")
    with servers.started_servers([stride], flags, log_folder=folder, api_key=api_key, timeout_s=timeout_s) as endpoints:
        yield endpoints[0].url
