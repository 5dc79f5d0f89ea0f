"""A decode step of Qwen3-8B compiles for one chip and never holds its KV pool twice. Training steps: test_plan.py."""

import pytest

from idlm_jax.deviceless import h200_mesh, tpu_mesh
from tests.compile.programs import compile_decode_step, pool_bytes

pytestmark = pytest.mark.compile

# The scan over layers copies one layer's weights: docs/decisions/0005.
LAYER_WEIGHTS = 387_000_000


@pytest.mark.parametrize(
    ("batch", "pool_tokens"), [(1, 32_832), pytest.param(8, 131_072, marks=pytest.mark.proof), (64, 524_288)]
)
def test_decode_step_at_32k_compiles_for_an_h200(batch, pool_tokens):
    compiled, state = compile_decode_step(h200_mesh(), kernels="triton", batch=batch, pool_tokens=pool_tokens)
    memory = compiled.memory_analysis()
    assert memory is not None
    # Token buffers of the state are donated too.
    assert pool_bytes(state) <= memory.alias_size_in_bytes
    # 4 MB a request: logits of 7 rows, and 32 partial results of the attention.
    assert memory.temp_size_in_bytes < LAYER_WEIGHTS + 4_000_000 * batch


@pytest.mark.parametrize(
    ("topology", "batch", "pool_tokens"),
    [
        ("v6e:2x2", 1, 32_832),
        pytest.param("v6e:2x2", 8, 65_536, marks=pytest.mark.proof),
        ("v5p:2x2x1", 64, 262_144),
    ],
)
def test_decode_step_at_32k_compiles_for_one_tpu_chip(topology, batch, pool_tokens):
    mesh = tpu_mesh(topology, (1,), ("data",))
    compiled, state = compile_decode_step(mesh, kernels="tpu", batch=batch, pool_tokens=pool_tokens)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert pool_bytes(state) <= memory.alias_size_in_bytes
    assert memory.temp_size_in_bytes < 40_000_000 + 12_000_000 * batch
