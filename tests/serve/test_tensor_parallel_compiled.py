"""The engine's decode step of Qwen3-8B over several devices: each holds its part, and little is said between them."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import Mesh

from idlm_jax.decoding import ISD
from idlm_jax.deviceless import compile_for, h200_mesh, tpu_mesh
from idlm_jax.model.language_model import from_module
from idlm_jax.model.transformer import INFERENCE_OPTIONS, PARAM_AXES, Qwen3
from idlm_jax.sharding import param_sharding
from pallas_kernels.bodies import BY_NAME
from serve import device
from serve.config import EngineConfig
from serve.mesh import placed, state_shardings, whole
from serve.packing import decode_words, layout_of, prefill_words
from tests.support.released import QWEN3_8B

pytestmark = pytest.mark.compile

CONFIG = EngineConfig(method=ISD(stride=4), max_running=8, num_pages=1024, max_len=32_768)
# Embedding, attention and MLP; a loop's body is listed once. Logits are gathered, never the head.
SUMS = ["all-reduce bf16[8,7,4096]"] * 3
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf" = \(*(.*?\]).* ({KINDS})(?:-start)?\(")


def check_step(mesh: Mesh, kernels: str, *, chunk_rows: int | None = None) -> list[str]:
    """Compiles a step of eight windows, or of one stretch of a prompt; checks what each device holds.

    Returns what devices exchange.
    """
    model = dataclasses.replace(QWEN3_8B, kernels=BY_NAME[kernels])
    lm = from_module(nnx.eval_shape(lambda: Qwen3(model, rngs=nnx.Rngs(0))))
    layout = layout_of(CONFIG.limits(model), CONFIG.max_stop_ids, CONFIG.num_biases)
    plan = device._plan(lm, CONFIG, CONFIG.method, device.Draws.FILTERED, mesh)
    state = jax.eval_shape(lambda: device._idle_state(lm, CONFIG, plan, layout))
    where = state_shardings(state, mesh)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        sharding = param_sharding(PARAM_AXES[names], leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    leaves, tree = jax.tree.flatten(jax.tree_util.tree_map_with_path(place, lm.params))
    body, words = device._run_windows, (8, decode_words(layout))
    if chunk_rows is not None:
        body, words = device._run_chunks, (1, prefill_words(layout, chunk_rows))
    compiled = compile_for(
        mesh,
        functools.partial(body, lm.graph, tree, plan, layout),
        leaves,
        placed(state, where),
        jax.ShapeDtypeStruct(words, jnp.int32, sharding=whole(mesh)),
        donate_argnums=1,
        out_shardings=(where, whole(mesh)),
        compiler_options=INFERENCE_OPTIONS,
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    pool = sum(leaf.size * leaf.dtype.itemsize for leaf in state.cache)
    rest = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state._replace(cache=None)))
    share = (2 * model.num_params + pool) / mesh.size  # bfloat16
    # Norms are on every device, as is what there is of requests beside the pool.
    assert share < memory.argument_size_in_bytes < 1.001 * share + 2 * rest
    assert memory.alias_size_in_bytes >= pool / mesh.size + rest
    # Half a layer's weights at most (docs/decisions/0005), and what 56 rows need: neither pool nor head twice.
    assert memory.temp_size_in_bytes < 250_000_000
    return sorted(f"{op} {shape}" for shape, op in COLLECTIVE.findall(compiled.as_text() or ""))


@pytest.mark.parametrize(("tp_size", "part"), [(2, 75_968), pytest.param(4, 37_984, marks=pytest.mark.proof)])
def test_over_h200s(tp_size, part):
    assert check_step(h200_mesh((tp_size,), ("tensor",)), "triton") == [f"all-gather f32[56,{part}]", *SUMS]


@pytest.mark.parametrize("target", ["h200", pytest.param("v6e", marks=pytest.mark.proof)])
def test_a_prefill_has_no_drafts_to_verify_and_compiles(target):
    """Arrays without elements crash the partitioner of jax 0.11.2."""
    mesh = h200_mesh((2,), ("tensor",)) if target == "h200" else tpu_mesh("v6e:2x2", (2,), ("tensor",))
    collectives = check_step(mesh, "triton" if target == "h200" else "tpu", chunk_rows=64)
    assert [each.split()[0] for each in collectives] == ["all-gather", *["all-reduce"] * 3]


def test_over_tpus():
    assert check_step(tpu_mesh("v6e:2x2", (4,), ("tensor",)), "tpu") == ["all-gather f32[4,37984,56]", *SUMS]
