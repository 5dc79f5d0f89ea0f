"""The decode step of a Qwen3-8B that the compile tests build, without an array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from idlm_jax.config import ModelConfig
from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.state import DecodeState, initial_state
from idlm_jax.decoding.step import decode_step
from idlm_jax.deviceless import compile_for, on_mesh
from idlm_jax.model.kv_cache import PAGE_SIZE, KVCache
from idlm_jax.model.transformer import INFERENCE_OPTIONS, Qwen3
from pallas_kernels.bodies import BY_NAME
from pallas_kernels.quantized_matmul import Form
from pallas_kernels.verify import Sampling
from tests.support.released import QWEN3_8B


def decode_state(config: ModelConfig, plan: StepPlan, batch: int, capacity: int, pool_tokens: int) -> DecodeState:
    """An abstract batch whose requests share a pool of `pool_tokens` slots, fewer than all of them could fill."""

    def build() -> DecodeState:
        sampling = Sampling(
            jnp.zeros(batch), jnp.zeros(batch, jnp.int32), jnp.zeros(batch), jnp.zeros(batch, jnp.uint32)
        )
        lengths = np.zeros(batch, np.int32)
        tokens, stop_ids = np.zeros((batch, capacity), np.int32), np.zeros((batch, 4), np.int32)
        return initial_state(config, plan, tokens, lengths, lengths, stop_ids, sampling)

    state = jax.eval_shape(build)
    layers, _, *page = state.cache.k.shape
    pool = jax.ShapeDtypeStruct((layers, pool_tokens // PAGE_SIZE, *page), state.cache.k.dtype)
    return state._replace(cache=KVCache(pool, pool))


def compile_decode_step(
    mesh: Mesh,
    *,
    kernels: str,
    batch: int,
    capacity: int = 32_768,
    pool_tokens: int,
    num_masks: int = 3,
    rows: int | None = None,
    quantize: Form | None = None,
    markov_rank: int | None = None,
    dump: str | None = None,
) -> tuple[Compiled, DecodeState]:
    """One donated forward of a running batch of Qwen3-8B on one device; `dump` as in `compile_for`.

    With `rows`, MASKs compete for them.
    """
    config = dataclasses.replace(QWEN3_8B, kernels=BY_NAME[kernels], quantize=quantize, markov_rank=markov_rank)
    plan = StepPlan(
        num_masks=num_masks,
        window_len=rows or 2 * num_masks + 1,
        places_masks=rows is not None,
        argmax_proposals=False,
        soft_proposals=False,
        filtered=False,
        all_greedy=False,
        num_top_logprobs=None,
        mask_token_id=151_669,
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    state = decode_state(config, plan, batch, capacity, pool_tokens)
    compiled = compile_for(
        mesh,
        lambda params, state: decode_step(nnx.merge(graph, params), plan, state),
        on_mesh(params, mesh, P()),
        on_mesh(state, mesh, P()),
        dump=dump,
        donate_argnums=1,
        compiler_options=INFERENCE_OPTIONS,
    )
    return compiled, state


def pool_bytes(state: DecodeState) -> int:
    return sum(int(np.prod(each.shape)) * each.dtype.itemsize for each in state.cache)
