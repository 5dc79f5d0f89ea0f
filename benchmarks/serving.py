"""AR, ISD and what it is compared with, each behind the server, by callers at once.

    python -m benchmarks.serving    # 20 minutes on two cores -> benchmarks/results/serve/baselines/

Wants a model trained for block diffusion (`python -m benchmarks.story run`), from the base that AR runs.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from serve.bench.servers import started_servers
from train.data import heldout_prompts
from train.data.tokenizer import load_tokenizer

BASE, DATASET = "assets/tiny-qwen3-py", Path("runs/data/stdlib_256_lora")
SERVER = ["--dtype", "float32", "--max-running-requests", "16", "--no-extras", "--context-length", "256"]


def main(
    adapter: Annotated[Path, typer.Option(help="Of ISD and of two-pass drafting.")] = Path("assets/tiny-qwen3-py-isd"),
    block_model: Annotated[Path, typer.Option(help="Trained for block diffusion in blocks of 4.")] = Path(
        "runs/story/block_diffusion_own_token-seed0/hf"
    ),
    strides: Annotated[str, typer.Option(help="Of ISD, as `serve.bench --strides` has them.")] = "4,4x2",
    concurrency: Annotated[str, typer.Option(help="Callers at once, comma-separated.")] = "1,4,16",
    num_prompts: Annotated[int, typer.Option(help="Of each load, system and round.")] = 64,
    rounds: Annotated[int, typer.Option(help="Counted; a warm-up comes first.")] = 3,
    out: Annotated[Path, typer.Option(help="New folder.")] = Path("benchmarks/results/serve/baselines"),
) -> None:
    """Starts the servers, puts load on all in turns, and writes what `serve.bench` writes."""
    adapted = ["--model-path", BASE, "--adapter", str(adapter)]
    systems: list[tuple[list[str], list[str]]] = [
        ([*strides.split(","), "two-pass-4"], adapted),
        (["block-4"], ["--model-path", str(block_model)]),
        (["1"], ["--model-path", BASE]),
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        prompts = Path(folder) / "prompts.jsonl"
        tokenizer = load_tokenizer(DATASET / "tokenizer")
        texts = [tokenizer.decode(ids) for ids in heldout_prompts(DATASET, num_prompts * rounds, 48)]
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        endpoints = [
            endpoint
            for methods, model in systems
            for endpoint in running.enter_context(
                started_servers(methods, [*model, *SERVER], log_folder=Path(folder), api_key=None, timeout_s=1800)
            )
        ]
        targets = [word for each in endpoints for word in ("--target", f"{each.name}={each.url}")]
        options = {
            "--prompts": prompts,
            "--concurrency": concurrency,
            "--num-prompts": num_prompts,
            "--rounds": rounds,
            "--max-tokens": 64,
            "--out": out,
            "--note": f"two CPU cores, which servers and load generator share; started by "
            f"`python -m benchmarks.serving --strides {strides} --concurrency {concurrency}`; stride-1 is the base, "
            f"block-4 {block_model}, the others the base with {adapter}",
        }
        words = [str(word) for pair in options.items() for word in pair]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        subprocess.run([sys.executable, "-m", "serve.bench", *targets, *words], check=True, env=environment)


if __name__ == "__main__":
    typer.run(main)
