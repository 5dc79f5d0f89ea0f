"""A Markov head's folder: it comes and goes with its checkpoint or adapter, and no other reader trips over it."""

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from idlm_jax.weights import WeightsError, export_adapter, export_hf, load
from tests.support.tiny_model import tiny_lm
from tests.weights.folders import assert_same_params, cpu_mesh, rewrite, tensors_of
from tests.weights.test_adapter import adapted_lm

FILE = "markov_head/model.safetensors"


@pytest.mark.parametrize("axes", [None, dict(fsdp=2, tensor=2)], ids=str)
def test_a_head_comes_back_bit_for_bit_with_its_checkpoint(tmp_path, axes):
    lm = tiny_lm(markov_rank=4, vocab_size=96, mask_token_id=95)
    export_hf(lm, tmp_path)
    found = load(tmp_path, dtype="float32", mesh=None if axes is None else cpu_mesh(**axes))
    assert found.config.markov_rank == 4
    assert_same_params(found, lm)


def test_a_head_comes_back_bit_for_bit_with_its_adapter_and_not_with_another(tmp_path):
    lm, headless = adapted_lm(markov_rank=4), adapted_lm()
    export_hf(headless, tmp_path / "base")
    for name, each in {"head": lm, "none": headless}.items():
        export_adapter(each, tmp_path / name, base_model_name_or_path="Qwen/Qwen3-8B")
    assert_same_params(load(tmp_path / "base", dtype="float32", adapter=tmp_path / "head"), lm)
    # Also where the base has a head of its own: drafts were trained with the one or with none.
    export_hf(tiny_lm(markov_rank=4), tmp_path / "base", overwrite=True)
    assert load(tmp_path / "base", dtype="float32").config.markov_rank == 4
    assert load(tmp_path / "base", dtype="float32", adapter=tmp_path / "none").config.markov_rank is None


def test_a_head_that_was_trained_with_an_adapter_is_not_exported_with_the_base(tmp_path):
    export_hf(adapted_lm(markov_rank=4), tmp_path)
    assert load(tmp_path, dtype="float32").config.markov_rank is None


def test_a_cast_export_casts_the_head(tmp_path):
    export_hf(tiny_lm(markov_rank=4), tmp_path, dtype="bfloat16")
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / FILE).values()} == {"bfloat16"}


def test_tensors_beside_the_checkpoint_are_the_base_alone(tmp_path):
    """Servers load whatever safetensors file lies beside it."""
    export_hf(tiny_lm(markov_rank=4), tmp_path / "head")
    export_hf(tiny_lm(), tmp_path / "none")
    head, none = tensors_of(tmp_path / "head"), tensors_of(tmp_path / "none")
    assert head.keys() == none.keys()


@pytest.mark.torch
def test_transformers_loads_the_folder(tmp_path):
    lm = tiny_lm(markov_rank=4)
    export_hf(lm, tmp_path)
    torch = pytest.importorskip("torch")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.arange(9, dtype=np.int32)[None]
    theirs = model(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(theirs, lm.logits(ids), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"columns": None}, "missing: columns"),
        ({"mix": None}, "missing: mix"),
        ({"shrink": np.zeros((8, 5), np.float32)}, "shape: shrink is (8, 5), wanted (8, 4)"),
        ({"more": np.zeros(3, np.float32)}, "unexpected: more"),
    ],
    ids=str,
)
def test_a_damaged_head_is_named(tmp_path, changes, problem):
    export_hf(tiny_lm(markov_rank=4), tmp_path)
    rewrite(tmp_path, changes, FILE)
    with pytest.raises(WeightsError) as caught:
        load(tmp_path, dtype="float32")
    assert any(each.startswith(problem) for each in caught.value.problems), caught.value.problems


def test_a_head_that_is_empty_or_cut_off_is_refused(tmp_path):
    export_hf(tiny_lm(markov_rank=4), tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(WeightsError, match="truncated or corrupt"):
        load(tmp_path, dtype="float32")
    (tmp_path / FILE).unlink()
    with pytest.raises(WeightsError, match="neither"):
        load(tmp_path, dtype="float32")


def test_a_head_is_kept_in_full_beside_8_bit_weights(tmp_path):
    lm = tiny_lm(markov_rank=4)
    export_hf(lm, tmp_path)
    found = load(tmp_path, dtype="float32", quantize="int8").module.markov
    jax.tree.map(np.testing.assert_array_equal, found.columns[...], lm.module.markov.columns[...])
