"""`python -m benchmarks.soak`: random traffic on the real server, and what must hold during and after it."""

import asyncio
import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from benchmarks.soak.course import soak
from benchmarks.soak.report import markdown, write
from benchmarks.soak.traffic import Traffic
from benchmarks.soak.watch import Sample, started

# Small on purpose: up to six requests, of which a long one wants five or six pages, share eight. So pages run out.
SERVER = (
    "--model-path assets/tiny-qwen3-py --adapter assets/tiny-qwen3-py-isd --dtype float32 --max-running-requests 6 "
    "--max-queued-requests 10 --context-length 448 --max-total-tokens 512 --chunked-prefill-size 64"
)


def main(
    seconds: Annotated[float, typer.Option(help="Of traffic.", min=1)] = 600,
    clients: Annotated[int, typer.Option(help="Who ask at once.", min=1)] = 12,
    pause: Annotated[float, typer.Option(help="Mean seconds that a client thinks between requests.", min=0.001)] = 0.2,
    seed: Annotated[int, typer.Option(help="Of what is asked; what meets what is up to the clock.")] = 0,
    max_growth: Annotated[
        float, typer.Option(help="Of resident memory: median of the last third over that of the middle third, less 1.")
    ] = 0.02,
    max_body_mb: Annotated[int, typer.Option(help="Of the server; larger bodies are part of the traffic.", min=1)] = 1,
    server_args: Annotated[
        str, typer.Option(help="Flags of python -m serve. By default the tiny model with few pages and a short queue.")
    ] = SERVER,
    name: Annotated[str, typer.Option(help="Of the files written.")] = "tiny-cpu",
    out: Annotated[Path, typer.Option(help="Folder for NAME.json, NAME.md, NAME.png, and NAME.log if it failed.")] = (
        Path("benchmarks/results/soak")
    ),
) -> None:
    """Starts a server, puts random traffic on it, and wants everything back.

    Clients complete, chat, follow a schema, stream, leave in the middle, abort, send too much and nonsense, and come
    all at once. Some ask the same again and again: the answers must be those they had alone. Then, at rest: every page
    free, no request left, memory flat, sockets closed; and SIGTERM under open streams, which finish, ends it with 0.

        python -m benchmarks.soak                                  # ten minutes on the tiny model
        python -m benchmarks.soak --seconds 60 --out /tmp/soak     # a look
        python -m benchmarks.soak --server-args "--model-path MODEL --max-total-tokens 20000" --name h200 --seconds 3600

    Exits with 0 if nothing was wrong, 1 with a list of what was, 2 if no soak took place.
    """
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s"
    with tempfile.TemporaryDirectory() as folder, tqdm(total=round(seconds), bar_format=bar_format) as bar:
        bar.set_description("starting, which compiles for minutes the first time")
        log = Path(folder) / "server.log"

        def show(sample: Sample, traffic: Traffic) -> None:
            bar.n = min(round(sample.at_s), bar.total)
            bar.set_description(
                f"{sum(traffic.counts.values())} answers, {len(traffic.violations)} wrong, "
                f"{sample.resident_bytes / 1e6:.0f} MB, {sample.num_preemptions} preemptions"
            )

        with started([*shlex.split(server_args), "--max-body-mb", str(max_body_mb)], log) as server:
            outcome = asyncio.run(
                soak(
                    server,
                    seconds=seconds,
                    num_clients=clients,
                    pause_s=pause,
                    max_body_bytes=max_body_mb * 2**20,
                    seed=seed,
                    max_growth=max_growth,
                    on_sample=show,
                )
            )
        settings = {
            "command": shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]]),
            "server": server_args,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "max_growth": max_growth,
            "machine": f"{os.cpu_count()} cores, {outcome.info['device']}",
            "versions": {"python": platform.python_version()}
            | {each: importlib.metadata.version(each) for each in ("jax", "fastapi", "uvicorn")},
        }
        write(out, name, outcome, settings)
        if outcome.violations:
            (out / f"{name}.log").write_bytes(log.read_bytes())
    print(markdown(name, outcome, settings))
    print(f"written: {out}/{name}.md and what it is made of", file=sys.stderr)
    if outcome.violations:
        sys.exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        print(f"benchmarks.soak: {error}", file=sys.stderr)
        sys.exit(2)
