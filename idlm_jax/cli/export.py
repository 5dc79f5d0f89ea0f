"""`idlm export`: read a checkpoint strictly and write it as a Qwen3 folder, plain or for the reference server."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

import idlm_jax


def export(
    model: Annotated[str, typer.Argument(help="Hugging Face folder (Qwen3, or I-DLM/SDAR-named) or hub id.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    reader: Annotated[
        Literal["transformers", "sglang"],
        typer.Option("--for", help="sglang: with what I-DLM's fork of it needs to launch (docs/sglang.md)."),
    ] = "transformers",
    adapter: Annotated[
        Path | None, typer.Option(help="With --for sglang: folder of a gated LoRA adapter (R-ISD), written beside.")
    ] = None,
    stride: Annotated[
        Literal["2", "3", "4", "8"], typer.Option(help="With --for sglang: the one that the command names.")
    ] = "4",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the written tensors.")] = "bfloat16",
    max_shard_gb: Annotated[float, typer.Option(help="Largest safetensors file, in GB.", min=0.001)] = 4.0,
    overwrite: Annotated[bool, typer.Option(help="Replace FOLDER once the new one is complete.")] = False,
) -> None:
    """Converts a checkpoint to safetensors that transformers and SGLang load as Qwen3.

    Every tensor is checked on the way in; the folder appears whole or not at all.
    """
    if reader == "transformers" and adapter is not None:
        raise ValueError("--adapter belongs to --for sglang: a gated adapter cannot be merged into a plain Qwen3")
    lm = idlm_jax.load(model, dtype=dtype, adapter=adapter)
    max_shard_bytes = int(max_shard_gb * 1e9)
    if reader == "sglang":
        command = idlm_jax.export_sglang(
            lm, folder, stride=int(stride), max_shard_bytes=max_shard_bytes, overwrite=overwrite
        )
    else:
        command = None
        idlm_jax.export_hf(lm, folder, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    print(f"{folder}: {lm.config.num_params:,} parameters, {dtype}")
    if command is not None:
        print(f"launch it with I-DLM's SGLang (SGLANG.md in the folder says more):\n{shlex.join(command)}")
