"""From a `LanguageModel` to a Hugging Face folder that transformers and SGLang load."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from idlm_jax.config import DType, ModelConfig, to_hf_config
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights.atomic_folder import atomic_folder
from idlm_jax.weights.hf_names import TensorSpec, base_tensors
from idlm_jax.weights.markov_head import write_markov_head
from idlm_jax.weights.tensor_file import write_tensors

# Fields of `to_hf_config` that say nothing about the logits: the source's own values are kept.
_FREE_FIELDS = {"attention_dropout", "initializer_range", "sliding_window", "use_cache"}
# Fields of the source that an export makes untrue: its custom code is not copied, its tensors are recast.
_DROPPED_FIELDS = {"auto_map", "dtype", "quantization_config", "torch_dtype"}
# transformers 5 saves tokenizers under names that 4.x, and so SGLang and vLLM of its time, do not know; it reads both.
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def export_hf(
    lm: LanguageModel,
    folder: str | Path,
    *,
    max_shard_bytes: int = 4_000_000_000,
    dtype: DType | None = None,
    overwrite: bool = False,
) -> None:
    """Writes safetensors (with an index when sharded), configs and tokenizer: the inverse of `load`.

    The folder appears whole or not at all. Host memory holds one shard, twice while it is written. A Markov head goes
    into a folder `markov_head` in it.

    A gated adapter cannot be merged: it acts on MASK rows only, while merged weights act on every row. Of a
    model with an adapter the base is exported; write the adapter, and the Markov head that was trained with it, with
    `export_adapter`.

    Args:
        lm: model to write; arrays may be sharded.
        folder: destination.
        max_shard_bytes: size above which a new file is begun; a larger tensor gets a file of its own.
        dtype: dtype of the files; None keeps the parameters' own, which makes the round trip exact.
        overwrite: replace an earlier export; until the new one is complete the old one stays.

    Raises:
        ValueError: `max_shard_bytes` is not positive.
        FileExistsError: the folder is not empty and `overwrite` is False, or it holds no earlier export.
        OSError: the disk is full or not writable; nothing is left behind.
        NotImplementedError: weights are held in 8 bits, or parameters are spread over several processes.
    """
    with atomic_folder(folder, overwrite=overwrite, marker="config.json") as partial:
        write_model(lm, partial, max_shard_bytes=max_shard_bytes, dtype=dtype)
        if lm.config.lora is None:
            write_markov_head(lm, partial, dtype)


def write_model(
    lm: LanguageModel,
    folder: Path,
    *,
    max_shard_bytes: int,
    dtype: DType | None,
    also: Mapping[str, Any] | None = None,
) -> None:
    """What `export_hf` writes, into a folder that is there; `also` are fields for `config.json` beside the model's.

    Raises:
        ValueError: `max_shard_bytes` is not positive.
        OSError: the disk is full or not writable.
        NotImplementedError: weights are held in 8 bits, or parameters are spread over several processes.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be positive")
    config = lm.config
    if config.quantize is not None:
        raise NotImplementedError(
            f"the model was loaded with quantize={config.quantize!r}, which keeps no weight as it was: load it "
            "without, and export that"
        )
    dtype = dtype or config.param_dtype
    shards = list(plan_shards(base_tensors(config), max_shard_bytes, jnp.dtype(dtype).itemsize))
    file_of: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(lm.params, specs, folder / name, dtype)
        file_of |= {spec.name: name for spec in specs}
    if len(shards) > 1:
        total = config.num_params * jnp.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", exported_config(config, lm.hf_config, dtype) | dict(also or {}))
    write_json(folder / "generation_config.json", _generation_config(config, lm.hf_config))
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)
        _name_tokenizer_for_4(folder / "tokenizer_config.json")


def exported_config(config: ModelConfig, source: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """`config.json` of the export: the source's fields where still true, ours where the model decides."""
    ours = {**to_hf_config(config), "torch_dtype": dtype}
    kept = {name: value for name, value in source.items() if name not in _DROPPED_FIELDS}
    if len(kept.get("layer_types") or ()) != config.num_layers:
        kept.pop("layer_types", None)
    if kept.get("rope_parameters"):
        kept["rope_parameters"] = {**kept["rope_parameters"], "rope_theta": config.rope_theta}
    decided = {name: value for name, value in ours.items() if name not in _FREE_FIELDS}
    if kept.get("eos_token_id") in config.eos_token_ids:
        # The full list belongs into generation_config.json; one id here is what the source had.
        del decided["eos_token_id"]
    return {**ours, **kept, **decided}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as Hugging Face does: indented by two, sorted, ending in a newline."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _name_tokenizer_for_4(file: Path) -> None:
    content: dict[str, Any] = json.loads(file.read_text())
    name = content.get("tokenizer_class")
    if name in _TOKENIZER_CLASSES:
        content["tokenizer_class"] = _TOKENIZER_CLASSES[name]
    if isinstance(special := content.pop("extra_special_tokens", None), list) and special:
        content["additional_special_tokens"] = special
    write_json(file, content)


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int, itemsize: int) -> Iterator[tuple[TensorSpec, ...]]:
    """Cuts the tensors, in order, into groups of at most `max_shard_bytes`, or of a single larger tensor."""
    shard: list[TensorSpec] = []
    size = 0
    for spec in specs:
        num_bytes = int(np.prod(spec.shape)) * itemsize
        if shard and size + num_bytes > max_shard_bytes:
            yield tuple(shard)
            shard, size = [], 0
        shard.append(spec)
        size += num_bytes
    if shard:
        yield tuple(shard)


def _generation_config(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    eos = list(config.eos_token_ids)
    special = {name: source[name] for name in ("bos_token_id", "pad_token_id") if source.get(name) is not None}
    return {**special, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
