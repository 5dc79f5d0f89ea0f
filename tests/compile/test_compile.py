"""The model compiles for hardware that is not here: sm_90 and TPU, small for real and Qwen3-8B in bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from idlm_jax.config import ModelConfig
from idlm_jax.deviceless import compile_for, h200_mesh, on_mesh, tpu_mesh
from idlm_jax.model.transformer import PARAM_AXES, Qwen3
from tests.support.released import QWEN3_8B

pytestmark = pytest.mark.compile

# Real proportions (GQA groups of 2, heads of 128 that do not multiply to the width), little of everything.
SMALL = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_size=768,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
)
AXES = ("data", "tensor")
# Tensor parallelism over heads, mlp and vocabulary, each divisible by 4 in both models.
SHARDED_LETTERS = "NKFV"


def param_spec(path: tuple[Any, ...]) -> P:
    names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    return P(*("tensor" if letter in SHARDED_LETTERS else None for letter in PARAM_AXES[names]))


def compile_forward(config: ModelConfig, mesh: Mesh, *, batch: int, rows: int) -> Compiled:
    """The causal forward with abstract parameters: no array is ever made."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    return compile_for(
        mesh,
        lambda params, tokens: nnx.merge(graph, params)(tokens),
        on_mesh(params, mesh, param_spec),
        on_mesh(jax.ShapeDtypeStruct((batch, rows), jnp.int32), mesh, P("data")),
    )


def check_bytes_per_device(compiled: Compiled, config: ModelConfig, *, num_shards: int) -> None:
    """Parameters arrive once and in equal parts; logits and temporaries add no more than a tenth to them."""
    memory = compiled.memory_analysis()
    assert memory is not None
    share = 2 * config.num_params / num_shards  # bfloat16
    # Norms are replicated: less than 0.02 % of the 8B model.
    assert share <= memory.argument_size_in_bytes <= 1.01 * share
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert total <= 1.1 * share


def test_causal_forward_compiles_for_sm_90():
    hlo = compile_forward(SMALL, h200_mesh((1, 1), AXES), batch=2, rows=128).as_text() or ""
    assert "__cublas" in hlo or "__triton" in hlo  # matrix products that only the CUDA compiler emits


def test_sharded_causal_forward_compiles_for_tpu():
    hlo = compile_forward(SMALL, tpu_mesh("v5e:2x2", (2, 2), AXES), batch=2, rows=128).as_text() or ""
    assert "all-reduce" in hlo
    assert "num_partitions=4" in hlo


def test_qwen3_8b_forward_fits_four_v5e_chips():
    compiled = compile_forward(QWEN3_8B, tpu_mesh("v5e:2x2", (1, 4), AXES), batch=1, rows=512)
    check_bytes_per_device(compiled, QWEN3_8B, num_shards=4)


def test_qwen3_8b_forward_fits_one_h200():
    compiled = compile_forward(QWEN3_8B, h200_mesh((1, 1), AXES), batch=1, rows=512)
    check_bytes_per_device(compiled, QWEN3_8B, num_shards=1)


def test_replicated_parameters_would_exceed_the_bounds():
    compiled = compile_forward(SMALL, tpu_mesh("v5e:2x2", (4, 1), AXES), batch=4, rows=128)
    with pytest.raises(AssertionError):
        check_bytes_per_device(compiled, SMALL, num_shards=4)


def test_a_mesh_larger_than_its_topology_is_refused():
    with pytest.raises(ValueError, match="needs 8 devices, the topology has 4"):
        tpu_mesh("v5e:2x2", (2, 4), AXES)
