"""From a Hugging Face folder or hub id to a `LanguageModel`: strict about tensors, frugal with memory."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from jax.sharding import Mesh

from idlm_jax.config import DType, ModelConfig, from_hf_config
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights.adapter import load_adapter
from idlm_jax.weights.assemble import build_state, read_params
from idlm_jax.weights.checkpoint import open_checkpoint
from idlm_jax.weights.hf_names import TIED_ALIASES, base_tensors
from idlm_jax.weights.markov_head import read_markov_head
from pallas_kernels.bodies import Body, choose_kernels
from pallas_kernels.quantized_matmul import VALUE_DTYPES, Form

_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load(
    path: str | Path,
    *,
    dtype: DType = "bfloat16",
    quantize: Form | None = None,
    adapter: str | Path | None = None,
    mesh: Mesh | None = None,
    mask_token_id: int | None = None,
    kernels: str = "auto",
) -> LanguageModel:
    """Loads a Qwen3 checkpoint, or an I-DLM/SDAR-named one, whose tensors are Qwen3's.

    Tensors are read one at a time straight into their sharding; see `read_params` for the memory bound. A Markov head
    in the folder is loaded along.

    Args:
        path: local folder, or a hub id, which is fetched into the local hub cache.
        dtype: dtype of parameters and compute; tensors are cast on the device.
        quantize: "int8" or "fp8" holds the projections of the blocks in 8 bits, quantised as they are read: for
            decoding and evaluation, not for training or export.
        adapter: folder or hub id of a gated adapter written by `export_adapter`.
        mesh: mesh with axes "fsdp" and "tensor" (either may be absent), all Auto; None for the default
            device.
        mask_token_id: MASK id for a vocabulary that neither names one nor has Qwen3's spare rows.
        kernels: "auto" for what is fastest on the default device, or "reference", "triton", "tpu"; the choice is
            logged.

    Returns:
        The model, with its tokenizer when the folder holds one, and the ids that end a completion taken from
        `generation_config.json` when it names them. Nothing else of that file is read: a repetition penalty
        there does not reach decoding.

    Raises:
        FileNotFoundError: no such folder, and the hub has no such repository or cannot be reached; or the
            folder has no `config.json`.
        WeightsError: lists every tensor that is missing, unexpected, duplicate, mis-shaped or not a float,
            and every unreadable file.
        ValueError: `config.json` or the adapter does not describe a model that this project computes, or
            `kernels` or `quantize` is unknown.
        NotImplementedError: the checkpoint uses a feature outside dense Qwen3, or 8-bit weights are to be cut over a
            mesh by a kernel that works on one device.
    """
    if quantize not in (None, *VALUE_DTYPES):
        raise ValueError(f"quantize={quantize!r} is not one of {[None, *VALUE_DTYPES]}")
    folder = _local_folder(path)
    hf_config = _read_json(folder / "config.json")
    config = from_hf_config(hf_config, dtype=dtype, mask_token_id=mask_token_id)
    config = dataclasses.replace(
        config, quantize=quantize, eos_token_ids=_eos_token_ids(folder, config), kernels=choose_kernels(kernels)
    )
    body = config.kernels.quantized_matmul
    if quantize is not None and mesh is not None and mesh.size > 1 and body is not Body.REFERENCE:
        # XLA cuts plain products, but not kernels.
        raise NotImplementedError(
            f"quantize={quantize!r} over {mesh.size} devices needs a body of quantized_matmul that XLA can cut, and "
            f'{body.value} is a kernel for one: load without quantize, or with kernels="reference"'
        )
    specs, checkpoint = base_tensors(config), open_checkpoint(folder)
    checkpoint.check(specs, aliases=TIED_ALIASES if config.tie_embeddings else None)
    rank, head = read_markov_head(folder, config, mesh)
    config = dataclasses.replace(config, markov_rank=rank)
    graph, params = build_state(config, head | read_params(checkpoint, specs, config, mesh))
    lm = LanguageModel(graph, params, _load_tokenizer(folder), hf_config)
    return lm if adapter is None else load_adapter(lm, _local_folder(adapter), mesh=mesh)


def _local_folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(path, Path) or folder.is_absolute() or str(path).count("/") > 1 or str(path).startswith("."):
        raise FileNotFoundError(f"no folder {str(path)!r}")
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=_HUB_FILES))
    # Offline, unknown, gated and malformed ids raise four unrelated families, all of them OSError or
    # ValueError.
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{str(path)!r} is not a local folder, and the hub did not deliver it ({error}). "
            "Give a folder, or fetch the repository where there is a network."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return dict(content)


def _eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """Qwen3 chat models name both <|im_end|> and <|endoftext|>, but only in `generation_config.json`."""
    path = folder / "generation_config.json"
    eos = _read_json(path).get("eos_token_id") if path.is_file() else None
    if eos is None:
        return config.eos_token_ids
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    # The config is given because `AutoTokenizer` would otherwise look the model type up, and SDAR's is not
    # its own; remote code is refused outright: it would be asked for on the terminal.
    return transformers.AutoTokenizer.from_pretrained(
        folder, config=transformers.Qwen3Config(), local_files_only=True, trust_remote_code=False
    )
