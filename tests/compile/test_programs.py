"""Whole steps of Qwen3-8B compile for one chip: decoding never holds its KV pool twice, training no score matrix."""

import pytest

from idlm_jax.deviceless import h200_mesh, tpu_mesh
from tests.compile.programs import compile_decode_step, compile_train_step, pool_bytes
from train.mesh import AXES

pytestmark = pytest.mark.compile

# The scan over layers copies one layer's weights: docs/decisions/0005.
LAYER_WEIGHTS = 387_000_000


@pytest.mark.parametrize(("batch", "pool_tokens"), [(1, 32_832), (8, 131_072), (64, 524_288)])
def test_decode_step_at_32k_compiles_for_an_h200(batch, pool_tokens):
    compiled, state = compile_decode_step(h200_mesh(), kernels="triton", batch=batch, pool_tokens=pool_tokens)
    memory = compiled.memory_analysis()
    assert memory is not None
    # Token buffers of the state are donated too.
    assert pool_bytes(state) <= memory.alias_size_in_bytes
    # 4 MB a request: logits of 7 rows, and 32 partial results of the attention.
    assert memory.temp_size_in_bytes < LAYER_WEIGHTS + 4_000_000 * batch


@pytest.mark.parametrize(
    ("topology", "batch", "pool_tokens"), [("v6e:2x2", 1, 32_832), ("v6e:2x2", 8, 65_536), ("v5p:2x2x1", 64, 262_144)]
)
def test_decode_step_at_32k_compiles_for_one_tpu_chip(topology, batch, pool_tokens):
    mesh = tpu_mesh(topology, (1,), ("data",))
    compiled, state = compile_decode_step(mesh, kernels="tpu", batch=batch, pool_tokens=pool_tokens)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert pool_bytes(state) <= memory.alias_size_in_bytes
    assert memory.temp_size_in_bytes < 40_000_000 + 12_000_000 * batch


def test_lora_train_step_at_4k_compiles_for_an_h200():
    compiled = compile_train_step(h200_mesh(), kernels="triton", batch_size=1)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes > 20e9  # base, adapter and optimizer state exist once
    # 18.5 GB with the reference's score matrices; 5.7 GB with the kernels.
    assert memory.temp_size_in_bytes < 6.5e9


def test_lora_train_step_at_4k_compiles_for_one_tpu_chip():
    mesh = tpu_mesh("v5p:2x2x1", (1,), ("data",))
    memory = compile_train_step(mesh, kernels="tpu", batch_size=1).memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes > 20e9
    assert memory.temp_size_in_bytes < 11e9


def test_full_train_step_at_4k_is_cut_over_eight_h200s():
    mesh = h200_mesh((1, 8, 1), AXES)
    memory = compile_train_step(mesh, kernels="triton", batch_size=8, lora_rank=None).memory_analysis()
    assert memory is not None
    # Float32 parameters and both moments of 8.19e9 weights, an eighth on each device.
    assert memory.alias_size_in_bytes < 1.01 * 12 * 8.19e9 / 8
    assert memory.temp_size_in_bytes < 13e9
