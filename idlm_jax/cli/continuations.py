"""`idlm continue`: a model's own continuations of the documents of a dataset."""

from pathlib import Path
from typing import Annotated, Any

import typer

import idlm_jax
from idlm_jax import options
from idlm_jax.cli.checkout import import_from_checkout
from idlm_jax.decoding.method import ISD


def continue_documents(
    dataset: Annotated[Path, typer.Argument(help="Folder written by `idlm pack`; its train side is read.")],
    out: Annotated[Path, typer.Argument(help="JSONL to write; the same command again continues it.")],
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    adapter: options.Adapter = None,
    stride: Annotated[int, typer.Option(help="Most tokens per forward, 1..16; 1 is plain AR.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens kept of each document.", min=1)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one continuation.", min=1)] = 224,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Every continuation's own seed follows from this and its line.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Continue the first so many documents only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents per compiled loop.", min=1)] = 64,
    dtype: options.Dtype = "bfloat16",
    kernels: options.Kernels = "auto",
) -> None:
    """Keeps the first tokens of every document and lets the model go on: training text that it would have decoded.

    For text without chats; chats are answered by `idlm regenerate`. Only what the model says is supervised. Documents
    of at most --prompt-tokens tokens are passed over, held-out ones are never read.

    Example: idlm continue data/code own.jsonl --model Qwen3-0.6B; idlm pack --out data/own --root own.jsonl
    --tokenizer Qwen3-0.6B
    """
    module: Any = import_from_checkout("train.data.continuations")
    settings = module.ContinueSettings(
        model=model,
        adapter=None if adapter is None else str(adapter),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    num_documents = module.continue_documents(
        dataset,
        out,
        settings,
        lm=idlm_jax.load(model, dtype=dtype, adapter=adapter, kernels=kernels),
        method=ISD(stride),
        limit=limit,
        batch_size=batch_size,
        show_progress=True,
    )
    print(f"{out}: {num_documents:,} documents")
