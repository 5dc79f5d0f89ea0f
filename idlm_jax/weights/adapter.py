"""Gated adapters in PEFT's file format, in and out.

PEFT has no notion of a gate. The files are plain PEFT, and a marker file beside them says on which rows the
adapter acts: an unknown key in `adapter_config.json` would make PEFT refuse it, and no marker at all would
let an ordinary adapter, which acts on every row, pass for one of ours.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from idlm_jax.config import DType, LoraConfig, ModelConfig
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights.assemble import build_state, flat_variables, read_params
from idlm_jax.weights.atomic_folder import atomic_folder
from idlm_jax.weights.checkpoint import WeightsError, open_checkpoint
from idlm_jax.weights.export import write_json
from idlm_jax.weights.hf_names import adapted_modules, adapter_tensors
from idlm_jax.weights.markov_head import read_markov_head, write_markov_head
from idlm_jax.weights.tensor_file import write_tensors

MARKER_FILE = "idlm_gate.json"
_CONFIG_FILE = "adapter_config.json"
_NOTE = (
    "This adapter acts on rows whose input is the MASK token and on no other row. Stock PEFT and an "
    "unmodified server load it without complaint and apply it to every token, which is not the model that "
    "was trained. It cannot be merged into the base weights."
)

# PEFT options that change what the factors mean; each must have this value or be absent.
_PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


def export_adapter(
    lm: LanguageModel, folder: str | Path, *, base_model_name_or_path: str, overwrite: bool = False
) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and the gate marker; whole or not at all.

    A Markov head goes into a folder `markov_head` beside them.

    Args:
        lm: model with an adapter and a MASK id.
        folder: destination.
        base_model_name_or_path: base checkpoint, as PEFT and servers will look it up.
        overwrite: replace an earlier adapter.

    Raises:
        ValueError: the model has no adapter or no MASK id.
        FileExistsError: the folder is not empty and `overwrite` is False, or it holds no earlier adapter.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    _check_adapted(lm)  # before a folder is made
    with atomic_folder(folder, overwrite=overwrite, marker=_CONFIG_FILE) as partial:
        write_adapter(lm, partial, base_model_name_or_path=base_model_name_or_path)
        write_markov_head(lm, partial, None)


def write_adapter(lm: LanguageModel, folder: Path, *, base_model_name_or_path: str, dtype: DType | None = None) -> None:
    """What `export_adapter` writes, into a folder that is there; `dtype` None keeps the parameters' own.

    Raises:
        ValueError: the model has no adapter or no MASK id.
        OSError: the disk is full or not writable.
    """
    lora, mask = _check_adapted(lm)
    peft_config = {
        **{name: value for name, value in _PLAIN_LORA.items() if value is not None},
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "r": lora.rank,
        "target_modules": list(adapted_modules()),
        "task_type": "CAUSAL_LM",
    }
    specs = adapter_tensors(lm.config)
    write_tensors(lm.params, specs, folder / "adapter_model.safetensors", dtype or lm.config.param_dtype)
    write_json(folder / _CONFIG_FILE, peft_config)
    write_json(folder / MARKER_FILE, {"gate": "mask_rows", "mask_token_id": mask, "note": _NOTE})


def _check_adapted(lm: LanguageModel) -> tuple[LoraConfig, int]:
    lora, mask = lm.config.lora, lm.config.mask_token_id
    if lora is None:
        raise ValueError("the model has no adapter; export_hf writes its base weights")
    if mask is None:
        raise ValueError("the model has no mask_token_id, so its adapter would act on no row")
    return lora, mask


def load_adapter(lm: LanguageModel, folder: str | Path, *, mesh: Mesh | None = None) -> LanguageModel:
    """The same base parameters, shared and not copied, with the adapter in `folder`, and its Markov head if it has one.

    Args:
        lm: base model; an adapter and a Markov head that it already has are replaced.
        folder: written by `export_adapter`, or a PEFT adapter with a marker file added by hand.
        mesh: mesh that the base was loaded on.

    Raises:
        WeightsError: lists every unsuitable option, and every missing, unexpected or mis-shaped tensor.
    """
    folder = Path(folder)
    peft_config, marker = _read_object(folder / _CONFIG_FILE), _read_object(folder / MARKER_FILE)
    problems = [*_config_problems(peft_config), *_marker_problems(marker, lm.config)]
    if problems:
        raise WeightsError(folder, problems)
    lora = LoraConfig(rank=int(peft_config["r"]), alpha=float(peft_config["lora_alpha"]))
    rank, head = read_markov_head(folder, lm.config, mesh)
    config = dataclasses.replace(lm.config, lora=lora, mask_token_id=marker["mask_token_id"], markov_rank=rank)
    specs, checkpoint = adapter_tensors(config), open_checkpoint(folder, "adapter_model")
    checkpoint.check(specs)
    base = {
        path: variable[...]
        for path, variable in flat_variables(lm.params).items()
        if not isinstance(variable, nnx.LoRAParam)
    }
    graph, params = build_state(config, base | head | read_params(checkpoint, specs, config, mesh))
    return dataclasses.replace(lm, graph=graph, params=params)


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        hint = ""
        if path.name == MARKER_FILE:
            hint = (
                ": an ungated adapter acts on every row and is no R-ISD adapter. If this one was trained on "
                f'MASK rows only, write {path.name} with {{"gate": "mask_rows", "mask_token_id": <id>}}'
            )
        raise WeightsError(path.parent, [f"file: {path.name} is missing{hint}"])
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(path.parent, [f"file: {path.name} is not JSON: {error}"]) from error
    if not isinstance(content, Mapping):
        raise WeightsError(path.parent, [f"file: {path.name} holds no object"])
    return content


def _config_problems(peft_config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{_CONFIG_FILE}: {name}={peft_config[name]!r}, allowed: {allowed!r}"
        for name, allowed in _PLAIN_LORA.items()
        # PEFT writes unset options as null, [] or {}.
        if name in peft_config and peft_config[name] != allowed and (peft_config[name] or allowed)
    ]
    rank, alpha, targets = (peft_config.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or rank < 1:
        problems.append(f"{_CONFIG_FILE}: r={rank!r}, allowed: an integer of at least 1")
    if not isinstance(alpha, int | float) or alpha <= 0:
        problems.append(f"{_CONFIG_FILE}: lora_alpha={alpha!r}, allowed: a positive number")
    if not isinstance(targets, list) or set(targets) != set(adapted_modules()):
        problems.append(f"{_CONFIG_FILE}: target_modules={targets!r}, allowed: {sorted(adapted_modules())}")
    return problems


def _marker_problems(marker: Mapping[str, Any], base: ModelConfig) -> list[str]:
    problems = []
    if marker.get("gate") != "mask_rows":
        problems.append(f"{MARKER_FILE}: gate={marker.get('gate')!r}, allowed: 'mask_rows'")
    found, wanted = marker.get("mask_token_id"), base.mask_token_id
    if wanted is not None and found != wanted:
        problems.append(f"{MARKER_FILE}: mask_token_id={found!r}, but the base model uses {wanted}")
    elif not isinstance(found, int) or not 0 <= found < base.vocab_size:
        problems.append(f"{MARKER_FILE}: mask_token_id={found!r}, allowed: 0..{base.vocab_size - 1}")
    return problems
