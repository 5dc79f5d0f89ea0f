"""The programs of a Qwen3-8B that the compile tests build: one decode step and one train step, without an array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from idlm_jax.config import LoraConfig, ModelConfig
from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.state import DecodeState, initial_state
from idlm_jax.decoding.step import decode_step
from idlm_jax.deviceless import compile_for, on_mesh
from idlm_jax.model.kv_cache import PAGE_SIZE, KVCache
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.bodies import BY_NAME
from pallas_kernels.verify import Sampling
from tests.support.released import QWEN3_8B
from train.batch import Batch
from train.config import load_config
from train.mesh import ROWS, state_sharding
from train.step import init_state, make_train_step


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
    mesh: Mesh, *, kernels: str, batch: int, capacity: int = 32_768, pool_tokens: int, num_masks: int = 3
) -> tuple[Compiled, DecodeState]:
    """One donated forward of a running batch of Qwen3-8B on one device."""
    config = dataclasses.replace(QWEN3_8B, kernels=BY_NAME[kernels])
    plan = StepPlan(
        num_masks=num_masks,
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
        donate_argnums=1,
    )
    return compiled, state


def pool_bytes(state: DecodeState) -> int:
    return sum(int(np.prod(each.shape)) * each.dtype.itemsize for each in state.cache)


def compile_train_step(
    mesh: Mesh, *, kernels: str, batch_size: int, length: int = 4096, lora_rank: int | None = 128
) -> Compiled:
    """One donated step on Qwen3-8B: gated LoRA on a bfloat16 base, or, without a rank, all weights in float32.

    `mesh` has one device, or the axes of a run's mesh.
    """
    lora = LoraConfig(rank=lora_rank, alpha=2.0 * lora_rank) if lora_rank else None
    param_dtype = "bfloat16" if lora_rank else "float32"
    model_config = dataclasses.replace(
        QWEN3_8B, kernels=BY_NAME[kernels], remat="full", param_dtype=param_dtype, lora=lora
    )
    overrides = [f"lora.rank={lora_rank}", f"lora.alpha={2 * lora_rank}"] if lora_rank else []
    config = load_config("configs/qwen3_8b_paper.yaml", [*overrides, f"batch_size={batch_size}"])
    graph, trainable, frozen = nnx.split(
        nnx.eval_shape(lambda: Qwen3(model_config, rngs=nnx.Rngs(0))), nnx.LoRAParam if lora_rank else nnx.Param, ...
    )
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
    state = jax.eval_shape(lambda params, frozen: init_state(config, params, frozen), trainable, frozen)
    index = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    batch = Batch(index, index, index, jax.ShapeDtypeStruct((batch_size, length), jnp.bool_), index)
    everywhere = NamedSharding(mesh, P())
    sharding = jax.tree.map(lambda _: everywhere, state) if mesh.size == 1 else state_sharding(state, mesh)
    placed = jax.tree.map(lambda leaf, of: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of), state, sharding)
    return compile_for(
        mesh,
        make_train_step(graph, config, config.spans[-1]),
        placed,
        on_mesh(batch, mesh, P() if mesh.size == 1 else ROWS),
        donate_argnums=0,
        out_shardings=(sharding, everywhere),
    )
