"""`python -m serve.bench`: puts load on OpenAI-compatible servers and reports what came of it."""

import asyncio
import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import httpx2
import typer
from rich.console import Console
from tqdm import tqdm

from serve.bench.client import Client, Endpoint, Sampling, find_model, server_info
from serve.bench.load import Burst, Closed, Load, Poisson
from serve.bench.measures import compare, compare_texts, measure
from serve.bench.plot import plot
from serve.bench.prompts import Prompt, read_prompts
from serve.bench.report import Result, print_report, write_report
from serve.bench.rounds import WARM_UP, Run, run_rounds
from serve.bench.servers import flags_of, name_of, started_servers

MIN_PROMPTS_EACH = 4  # of a caller; with fewer, a closed loop is emptying for much of its time
Mode = Literal["closed", "poisson", "burst"]
Number = TypeVar("Number", int, float)


def bench(
    target: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]URL of an OpenAI-compatible server, up to and with /v1; may be given several times."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="By default the one model that /v1/models names.")] = None,
    model_path: Annotated[
        str | None,
        typer.Option(help="Start this project's server with this model, once per stride, and stop it after."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="With --model-path: folder of a gated LoRA adapter.")] = None,
    strides: Annotated[
        str | None,
        typer.Option(
            help="With --model-path: 1 is plain AR, 4x2 has two branches, 8r15 has 15 rows, auto chooses; two-pass-4 "
            "and block-4 stand beside them. Default 4,1."
        ),
    ] = None,
    serve_args: Annotated[str, typer.Option(help='With --model-path: for the servers, as in "--dtype float32".')] = "",
    start_timeout: Annotated[float, typer.Option(help="Seconds a started server may load and compile.")] = 1800,
    prompts: Annotated[
        Path | None, typer.Option(help='.jsonl with "prompt", "messages" or "conversations"; else a prompt a line.')
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions.")] = False,
    mode: Annotated[
        Mode,
        typer.Option(
            help="closed: N callers who wait for answers; poisson: R requests/s whatever happens; burst: all."
        ),
    ] = "closed",
    concurrency: Annotated[str | None, typer.Option(help="Callers, a point each. Default 1,8,32.")] = None,
    rate: Annotated[str | None, typer.Option(help="Requests per second, a point each, as in 2,8.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests per point, target and round.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Counted rounds; a warm-up comes first.", min=1)] = 3,
    baseline: Annotated[str | None, typer.Option(help="Target that ratios are to. Default: the last named.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Always --max-tokens. Text past its end repeats itself, which flatters acceptance.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of arrival times; request i samples with seed + i.", min=0)] = 0,
    compare_text: Annotated[
        bool, typer.Option("--compare-texts", help="Count completions unlike the baseline's (--temperature 0).")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until a request counts as failed.")] = 600,
    api_key: Annotated[str | None, typer.Option(envvar="IDLM_API_KEY", help="Sent to every target.")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for result.json, report.md, plot.png.")] = None,
    note: Annotated[
        str, typer.Option(help="For the report: what cannot be seen from here, as the servers' device.")
    ] = "",
) -> None:
    """Measures throughput, latency and acceptance of one or several servers, in turns, round by round.

    AR against ISD on one engine:

        python -m serve.bench --model-path assets/tiny-qwen3-py --adapter assets/tiny-qwen3-py-isd
        --serve-args "--dtype float32" --prompts prompts.jsonl --concurrency 1,8 --compare-texts --out runs/bench

    Servers that run already:

        python -m serve.bench --target isd=http://127.0.0.1:30000/v1 --target ar=http://127.0.0.1:30001/v1
        --prompts prompts.jsonl --mode poisson --rate 2,8

    Exits with 0 if all requests were answered, 1 if any failed, 2 if nothing could be measured, 130 after Ctrl-C, when
    it reports what was finished. docs/bench_serving.md says what the numbers mean.
    """
    arguments = dict(locals())  # nothing else is bound yet
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, ignore_eos=ignore_eos, seed=seed)
    loads = make_loads(mode, concurrency, rate)
    endpoints = [parse_target(text) for text in target or []]
    started = (strides or "4,1").split(",") if model_path is not None else []
    for stride in started:
        flags_of(stride)  # refuses what is none, before anything is started
    names = [*(each.name for each in endpoints), *map(name_of, started)]
    check_names(names, baseline)
    if model_path is None and (adapter or strides or serve_args):
        raise ValueError("--adapter, --strides and --serve-args belong to --model-path")
    if compare_text and (temperature != 0 or len(names) < 2):
        raise ValueError("--compare-texts takes --temperature 0 and at least two targets")
    if prompts is None:
        raise ValueError(
            'give --prompts FILE: JSONL with {"prompt": ...} or {"messages": [...]}, or text with a prompt a line; '
            "docs/bench_serving.md shows how to take held-out ones"
        )
    asked = read_prompts(prompts, as_chat=chat)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "result.json").exists():
            raise ValueError(f"{out} holds a result already: give another --out")
    runs: list[Run] = []
    description: list[dict[str, Any]] = []
    was_interrupted = False
    with contextlib.ExitStack() as stack:
        try:
            if model_path is not None:
                logs = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                flags = ["--model-path", model_path, *(["--adapter", str(adapter)] if adapter else [])]
                flags += shlex.split(serve_args)
                endpoints += stack.enter_context(
                    started_servers(started, flags, log_folder=logs, api_key=api_key, timeout_s=start_timeout)
                )
            for endpoint in endpoints:
                found = model or find_model(endpoint, api_key)
                info = server_info(endpoint, api_key)
                description.append({"name": endpoint.name, "url": endpoint.url, "model": found, "server_info": info})
            asyncio.run(
                _run(
                    [
                        Client(endpoint, each["model"], sampling, api_key=api_key, timeout_s=timeout)
                        for endpoint, each in zip(endpoints, description, strict=True)
                    ],
                    loads,
                    asked,
                    runs,
                    num_rounds=rounds,
                    num_prompts=num_prompts,
                    seed=seed,
                )
            )
        except KeyboardInterrupt:
            was_interrupted = True
    chosen = baseline or names[-1]
    result = Result(
        settings=_settings(arguments, api_key, description, note),
        runs=runs,
        measures=measure(runs),
        ratios=compare(runs, chosen),
        baseline=chosen,
        texts=compare_texts(runs, chosen) if compare_text else None,
        num_prompts_in_file=len(asked),
        short_loads=[
            load.label
            for load in loads
            if isinstance(load, Closed) and num_prompts < MIN_PROMPTS_EACH * load.concurrency
        ],
        was_interrupted=was_interrupted,
    )
    print_report(result, Console())
    if out is not None:
        write_report(result, out, has_plot=plot(out / "plot.png", result.measures, note))
        print(f"written: {out}/report.md and what it is made of", file=sys.stderr)
    if was_interrupted:
        raise typer.Exit(130)
    if result.num_failures:
        raise typer.Exit(1)


def parse_target(text: str) -> Endpoint:
    """Reads `[NAME=]URL`; without a name, host and port are one.

    Raises:
        ValueError: no http address.
    """
    name, equals, rest = text.partition("=")
    if not equals or "://" in name:
        name, rest = "", text
    try:
        url = httpx2.URL(rest.rstrip("/"))
    except httpx2.InvalidURL as error:
        raise ValueError(f"--target {text!r}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--target {text!r} must be [NAME=]URL with a URL as in http://127.0.0.1:30000/v1")
    return Endpoint(name or url.netloc.decode(), str(url))


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Reads comma-separated numbers.

    Raises:
        ValueError: something else, or one twice.
    """
    try:
        numbers = [kind(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be numbers with commas between, as in 1,8") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{option} {text!r} names a number twice")
    return numbers


def make_loads(mode: Mode, concurrency: str | None, rate: str | None) -> list[Load]:
    """The points of a benchmark.

    Raises:
        ValueError: numbers that are none, or that the mode does not take.
    """
    if concurrency is not None and mode != "closed":
        raise ValueError(f"--concurrency belongs to --mode closed, not {mode}")
    if (rate is not None) != (mode == "poisson"):
        raise ValueError(f"--mode poisson takes --rate, and no other does; got --mode {mode}, --rate {rate}")
    if rate is not None:
        return [Poisson(each) for each in parse_numbers("--rate", rate, float)]
    if mode == "burst":
        return [Burst()]
    return [Closed(each) for each in parse_numbers("--concurrency", concurrency or "1,8,32", int)]


def check_names(names: Sequence[str], baseline: str | None) -> None:
    """Raises ValueError unless there are targets, they differ, and the baseline is one."""
    if not names:
        raise ValueError("give --target [NAME=]URL, or --model-path FOLDER to start this project's servers")
    if len(set(names)) < len(names):
        raise ValueError(f"targets must have different names, got {', '.join(names)}")
    if baseline is not None and baseline not in names:
        raise ValueError(f"--baseline {baseline!r} is none of the targets {', '.join(names)}")


async def _run(
    clients: Sequence[Client], loads: Sequence[Load], prompts: Sequence[Prompt], runs: list[Run], **sizes: int
) -> None:
    total = len(clients) * len(loads) * (sizes["num_rounds"] + 1) * sizes["num_prompts"]
    async with contextlib.AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        with tqdm(total=total, unit="request") as bar:

            def show(run: Run) -> None:
                number = "warm-up" if run.round == WARM_UP else f"round {run.round}/{sizes['num_rounds']}"
                bar.set_description(f"{run.load}, {number}, {run.target}", refresh=False)
                bar.update()

            await run_rounds(clients, loads, prompts, runs, on_record=show, **sizes)


def _settings(
    arguments: dict[str, Any], api_key: str | None, targets: list[dict[str, Any]], note: str
) -> dict[str, Any]:
    command = shlex.join(["python", "-m", "serve.bench", *sys.argv[1:]])
    return {
        # The key may stand in --api-key or in --serve-args.
        "command": command.replace(api_key, "***") if api_key else command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "note": note,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {name: version for name in ("idlm-jax", "jax", "httpx2") if (version := _version(name))},
        "targets": targets,
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in arguments.items()
            if name not in ("api_key", "serve_args", "note")
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Runs; a refused input ends in one line on stderr and exit code 2, never in a traceback."""
    # Whoever ends the benchmark by SIGTERM, or by closing its terminal, ends the servers that it started too. A shell
    # that runs a script's command in the background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        typer.run(bench)
    except (ValueError, OSError) as error:
        print(f"serve.bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
