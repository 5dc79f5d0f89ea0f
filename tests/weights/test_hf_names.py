"""The table of names is a bijection onto the parameters of the module."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from idlm_jax.config import LoraConfig
from idlm_jax.model.transformer import PARAM_AXES
from idlm_jax.weights.hf_names import HF_MODULES, adapted_modules, adapter_tensors, base_tensors
from tests.support.tiny_model import tiny_config, tiny_module

LORA = LoraConfig(rank=3, alpha=6.0)


def test_every_parameter_has_one_name_and_every_name_one_parameter():
    assert HF_MODULES.keys() == PARAM_AXES.keys()
    assert len(set(HF_MODULES.values())) == len(HF_MODULES)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("heads", [(4, 2, 16), (4, 4, 8), (6, 1, 10)], ids=str)
def test_the_tensors_are_exactly_the_parameters_of_the_module(is_tied, heads):
    num_heads, num_kv_heads, head_dim = heads
    changes = dict(tie_embeddings=is_tied, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, lora=LORA)
    specs = base_tensors(tiny_config(**changes)) + adapter_tensors(tiny_config(**changes))
    assert len({spec.name for spec in specs}) == len(specs)
    module = nnx.eval_shape(lambda: tiny_module(**changes))
    slices = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        is_stacked = path[0] == "blocks"
        for layer in range(variable.shape[0]) if is_stacked else [None]:
            slices[path, layer] = variable.shape[1:] if is_stacked else variable.shape
    assert {(spec.path, spec.layer): spec.shape for spec in specs} == slices


def test_layouts_invert_each_other():
    config = tiny_config(lora=LORA)
    for spec in base_tensors(config) + adapter_tensors(config):
        theirs = jnp.arange(math.prod(spec.hf_shape), dtype=jnp.float32).reshape(spec.hf_shape)
        assert spec.from_hf(theirs).shape == spec.shape
        np.testing.assert_array_equal(spec.to_hf(spec.from_hf(theirs)), theirs)
        assert len(spec.hf_axes) == theirs.ndim and len(spec.axes) == len(spec.shape)


def test_the_adapter_covers_all_seven_projections():
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(adapted_modules()) == names
    with pytest.raises(ValueError, match="no adapter"):
        adapter_tensors(tiny_config())
