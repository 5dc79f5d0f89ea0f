"""PEFT folders of gated adapters: ours come back bit for bit, ungated or altered ones are refused."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from idlm_jax.config import LoraConfig
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights import WeightsError, export_adapter, export_hf, load
from tests.support.tiny_model import tiny_lm
from tests.weights.folders import assert_same_params, cpu_mesh, edit_json, rewrite

FILE = "adapter_model.safetensors"
A = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"


def adapted_lm(**changes) -> LanguageModel:
    """Both factors random: a fresh adapter has B = 0 and would hide most mistakes."""
    lm = tiny_lm(lora=LoraConfig(rank=3, alpha=6.0), **changes)
    keys = iter(jax.random.split(jax.random.key(7), 64))

    def redraw(variable):
        if not isinstance(variable, nnx.LoRAParam):
            return variable
        return variable.replace(jax.random.normal(next(keys), variable.shape))

    flat = [(path, redraw(variable)) for path, variable in nnx.to_flat_state(lm.params)]
    return LanguageModel(lm.graph, nnx.from_flat_state(flat))


@pytest.fixture
def folders(tmp_path):
    lm = adapted_lm()
    export_hf(lm, tmp_path / "base")
    export_adapter(lm, tmp_path / "adapter", base_model_name_or_path="Qwen/Qwen3-8B")
    return tmp_path / "base", tmp_path / "adapter"


def problems_of(folders) -> tuple[str, ...]:
    base, adapter = folders
    with pytest.raises(WeightsError) as caught:
        load(base, dtype="float32", adapter=adapter)
    return caught.value.problems


@pytest.mark.parametrize("axes", [None, dict(fsdp=2, tensor=2)], ids=str)
def test_an_adapter_comes_back_bit_for_bit(folders, axes):
    base, adapter = folders
    lm = load(base, dtype="float32", adapter=adapter, mesh=None if axes is None else cpu_mesh(**axes))
    assert lm.config.lora == LoraConfig(rank=3, alpha=6.0)
    assert_same_params(lm, adapted_lm())


def test_the_files_are_those_of_peft_and_a_marker(folders):
    _, adapter = folders
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", FILE, "idlm_gate.json"}
    tensors = load_file(adapter / FILE)
    assert len(tensors) == 2 * 7 * 2
    # o_proj reads all heads (4 of 16) and writes the width (32).
    assert tensors[A].shape == (3, 64)
    assert tensors[A.replace("lora_A", "lora_B")].shape == (32, 3)
    marker = json.loads((adapter / "idlm_gate.json").read_text())
    assert (marker["gate"], marker["mask_token_id"]) == ("mask_rows", 96)
    assert "apply it to every token" in marker["note"]


def test_an_ungated_adapter_is_refused(folders):
    (folders[1] / "idlm_gate.json").unlink()
    (problem,) = problems_of(folders)
    assert "idlm_gate.json is missing" in problem and "ungated" in problem


@pytest.mark.parametrize(
    "change",
    [
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(bias="all"),
        dict(fan_in_fan_out=True),
        dict(rank_pattern={"q_proj": 8}),
        dict(alpha_pattern={"q_proj": 8}),
        dict(modules_to_save=["lm_head"]),
        dict(layers_to_transform=[0]),
        dict(peft_type="IA3"),
        dict(r=0),
        dict(lora_alpha=...),
        dict(target_modules=["q_proj", "v_proj"]),
        dict(target_modules="all-linear"),
    ],
    ids=str,
)
def test_an_option_that_changes_the_meaning_of_the_factors_is_refused(folders, change):
    edit_json(folders[1] / "adapter_config.json", **change)
    (problem,) = problems_of(folders)
    assert problem.startswith(f"adapter_config.json: {next(iter(change))}=")


def test_unset_options_as_peft_writes_them_are_accepted(folders):
    base, adapter = folders
    edit_json(adapter / "adapter_config.json", modules_to_save=None, rank_pattern={}, layers_to_transform=None)
    assert load(base, adapter=adapter).config.lora is not None


def test_every_wrong_tensor_is_listed(folders):
    tensors = load_file(folders[1] / FILE)
    rewrite(
        folders[1],
        {
            A: None,
            A.replace("o_proj", "q_proj"): np.ascontiguousarray(tensors[A.replace("o_proj", "q_proj")].T),
            "base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32),
        },
        FILE,
    )
    assert set(problems_of(folders)) == {
        f"missing: {A}, wanted shape (3, 64)",
        f"shape: {A.replace('o_proj', 'q_proj')} is (32, 3), wanted (3, 32)",
        f"unexpected: base_model.model.lm_head.lora_A.weight of shape (3, 32) in {FILE}",
    }


def test_a_rank_that_the_factors_do_not_have_is_refused(folders):
    edit_json(folders[1] / "adapter_config.json", r=4)
    problems = problems_of(folders)
    assert len(problems) == 2 * 7 * 2 and all(problem.startswith("shape:") for problem in problems)


def test_gate_and_base_must_mean_the_same_mask(folders):
    edit_json(folders[1] / "idlm_gate.json", mask_token_id=95)
    assert problems_of(folders) == ("idlm_gate.json: mask_token_id=95, but the base model uses 96",)
    edit_json(folders[1] / "idlm_gate.json", mask_token_id=96, gate="all_rows")
    assert problems_of(folders) == ("idlm_gate.json: gate='all_rows', allowed: 'mask_rows'",)


def test_a_base_without_a_mask_id_takes_that_of_the_adapter(folders):
    edit_json(folders[0] / "config.json", mask_token_id=None)
    assert load(folders[0], adapter=folders[1]).config.mask_token_id == 96
    edit_json(folders[1] / "idlm_gate.json", mask_token_id=97)
    with pytest.raises(WeightsError, match="97"):
        load(folders[0], adapter=folders[1])


def test_only_a_model_with_an_adapter_and_a_mask_id_exports_one(tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        export_adapter(tiny_lm(), tmp_path / "out", base_model_name_or_path="x")
    with pytest.raises(ValueError, match="no mask_token_id"):
        export_adapter(adapted_lm(mask_token_id=None), tmp_path / "out", base_model_name_or_path="x")
    assert not (tmp_path / "out").exists()
