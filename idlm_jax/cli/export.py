"""`idlm export`: read a checkpoint strictly and write it as a plain Qwen3 folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import idlm_jax


def export(
    model: Annotated[str, typer.Argument(help="Hugging Face folder (Qwen3, or I-DLM/SDAR-named) or hub id.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the written tensors.")] = "bfloat16",
    max_shard_gb: Annotated[float, typer.Option(help="Largest safetensors file, in GB.", min=0.001)] = 4.0,
    overwrite: Annotated[bool, typer.Option(help="Replace FOLDER once the new one is complete.")] = False,
) -> None:
    """Converts a checkpoint to safetensors that transformers and SGLang load as Qwen3.

    Every tensor is checked on the way in; the folder appears whole or not at all.
    """
    lm = idlm_jax.load(model, dtype=dtype)
    idlm_jax.export_hf(lm, folder, max_shard_bytes=int(max_shard_gb * 1e9), overwrite=overwrite)
    print(f"{folder}: {lm.config.num_params:,} parameters, {dtype}")
