"""The engine's programs for Qwen3-8B compile for an H200 and never hold the KV pool twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from idlm_jax.decoding import ISD
from idlm_jax.deviceless import compile_for, h200_mesh, on_mesh
from idlm_jax.model.language_model import from_module
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.bodies import BY_NAME
from serve import device
from serve.config import EngineConfig
from serve.packing import decode_words, layout_of, prefill_words
from tests.support.released import QWEN3_8B

pytestmark = pytest.mark.compile

CONFIG = EngineConfig(method=ISD(stride=4), max_running=32, num_pages=4096, max_len=32_768)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_step_updates_the_pool_in_place(kind):
    mesh = h200_mesh()
    model = dataclasses.replace(QWEN3_8B, kernels=BY_NAME["triton"])
    lm = from_module(nnx.eval_shape(lambda: Qwen3(model, rngs=nnx.Rngs(0))))
    layout = layout_of(CONFIG.limits(model), CONFIG.max_stop_ids, CONFIG.num_biases)
    plan = device._plan(lm, CONFIG, CONFIG.method, device.Draws.FILTERED)
    state = jax.eval_shape(lambda: device._idle_state(lm, CONFIG, plan, layout))
    leaves, tree = jax.tree.flatten(lm.params)
    body = device._run_windows if kind == "decode" else device._run_chunks
    shape = (32, decode_words(layout)) if kind == "decode" else (1, prefill_words(layout, 512))
    words = jax.ShapeDtypeStruct(shape, jnp.int32)
    compiled = compile_for(
        mesh,
        functools.partial(body, lm.graph, tree, plan, layout),
        *(on_mesh(each, mesh, P()) for each in (leaves, state, words)),
        donate_argnums=1,
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    donated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= donated
    # One layer's weights (docs/decisions/0005), the rows' activations and logits, and the gathered logits of drafts.
    assert memory.temp_size_in_bytes < 1_000_000_000
