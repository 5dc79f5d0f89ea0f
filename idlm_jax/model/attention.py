"""Grouped-query attention with per-head query/key RMSNorm, and the functions that decide what it attends to.

A block does not know whether it trains, prefills or decodes: it hands its rotated queries, keys and values to an
`Attend` and adds what comes back. Masks are boolean with True = may attend.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.array_types import Hidden, Keys, Queries, RowGate
from idlm_jax.config import ModelConfig
from idlm_jax.model.kv_cache import POOL_SPEC, KVCache
from idlm_jax.model.layers import RMSNorm, apply_rope, make_projection
from pallas_kernels.bodies import Kernels
from pallas_kernels.paged_attention import paged_attention, write_pages

# `half` is H // 2; jaxtyping cannot derive one argument's axis from an axis that no earlier argument has bound.
Pools = tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]
RopeTables = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


@runtime_checkable  # beartype checks every hint when the tests run
class Attend(Protocol):
    """Mixes values for one layer and hands on `carried`, whatever the caller carries from layer to layer."""

    def __call__(self, q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]: ...


class Attention(nnx.Module):
    """Projections, norms and rotation around an `Attend`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = (config.hidden_size,)
        query_heads = (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        self.q = make_projection(width, query_heads, config, rngs=rngs)
        self.k = make_projection(width, kv_heads, config, rngs=rngs)
        self.v = make_projection(width, kv_heads, config, rngs=rngs)
        self.o = make_projection(query_heads, width, config, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config)
        self.k_norm = RMSNorm(config.head_dim, config)

    def __call__(
        self,
        x: Hidden,
        rope: RopeTables,
        attend: Attend,
        layer: Int[Array, ""],
        carried: Any,
        lora_gate: RowGate | None,
    ) -> tuple[Hidden, Any]:
        q = apply_rope(self.q_norm(self.q(x, lora_gate, layer)), rope)
        k = apply_rope(self.k_norm(self.k(x, lora_gate, layer)), rope)
        mixed, carried = attend(q, k, self.v(x, lora_gate, layer), layer, carried)
        return self.o(mixed, lora_gate, layer), carried


def attention_scores(q: Queries, k: Float[Array, "B S K H"]) -> Float[Array, "B K G T S"]:
    """q·k / sqrt(H), accumulated and returned in float32; query head n reads key head n // G."""
    batch, rows, heads, head_dim = q.shape
    grouped = q.reshape(batch, rows, k.shape[2], heads // k.shape[2], head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    return scores * head_dim**-0.5


def mix_values(probs: Float[Array, "B K G T S"], v: Float[Array, "B S K H"]) -> Queries:
    """Weighted values, float32 accumulation, back in the dtype of `v`."""
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
    batch, rows, kv_heads, groups, head_dim = mixed.shape
    return mixed.reshape(batch, rows, kv_heads * groups, head_dim).astype(v.dtype)


def masked_attention(
    q: Queries, k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "B T S"]
) -> Queries:
    """Dense attention under an explicit mask; a row that may attend to nothing returns zeros."""
    scores = jnp.where(mask[:, None, None], attention_scores(q, k), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return mix_values(weights / jnp.where(total > 0, total, 1.0), v)


def causal_attend(visible: Bool[Array, "B T T"]) -> Attend:
    """Attention among the given rows alone, without a cache."""

    def attend(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]:
        del layer
        return masked_attention(q, k, v, visible), carried

    return attend


def paged_attend(
    page_table: Int[Array, "B pages"],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"] | None,
    kernels: Kernels,
    mesh: Mesh | None = None,
) -> Attend:
    """Attention over a `KVCache`, which is carried: the new rows are written first, then read like the rest.

    Args:
        page_table: pages of each request, the same in every layer.
        context_len: committed slots of each request; new row t goes to slot `context_len + t`.
        visible: which new rows each new row sees; None is strictly causal.
        kernels: the bodies of the attention op.
        mesh: whose "tensor" axis cuts the key heads, of the pool (`POOL_SPEC`) too; None for one device.
    """

    def read(q: Queries, pools: Pools, table: Int[Array, "B pages"], how: dict[str, Any]) -> Queries:
        return paged_attention(q, *pools, table, context_len, visible, **how)

    return _written_then_read(read, page_table, context_len, kernels, mesh)


def paged_block_attend(
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
    block_length: int,
    kernels: Kernels,
    mesh: Mesh | None = None,
) -> Attend:
    """Attention over a `KVCache` within and before blocks: each row sees all of its block and of those before it.

    Once a block's keys are written, its rows see what a context that ends behind it holds, and nothing new: the op
    needs no mask above the diagonal. Slots for another block behind the last must exist.

    Args:
        page_table: as in `paged_attend`.
        start: slot of each request's first new row, where a block starts. Rows are whole blocks.
        block_length: rows of a block, L.
        kernels: as in `paged_attend`.
        mesh: as in `paged_attend`.
    """

    def read(q: Queries, pools: Pools, table: Int[Array, "B pages"], how: dict[str, Any]) -> Queries:
        batch, rows = q.shape[:2]
        blocks = rows // block_length
        behind = start[:, None] + block_length * jnp.arange(1, blocks + 1, dtype=jnp.int32)[None]
        nothing_new = jnp.zeros((batch * blocks, block_length, block_length), bool)
        by_block = q.reshape(batch * blocks, block_length, *q.shape[2:])
        mixed = paged_attention(
            by_block, *pools, jnp.repeat(table, blocks, axis=0), behind.reshape(-1), nothing_new, **how
        )
        return mixed.reshape(q.shape)

    return _written_then_read(read, page_table, start, kernels, mesh)


def _written_then_read(
    read: Callable[[Queries, Pools, Int[Array, "B pages"], dict[str, Any]], Queries],
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
    kernels: Kernels,
    mesh: Mesh | None,
) -> Attend:
    """Writes the new rows from slot `start` on and reads them back like the rest.

    Args:
        read: queries, key and value pages of all layers, page table of this layer, and how the op runs -> mixed values.
        page_table: as in `paged_attend`.
        start: slot of each request's first new row.
        kernels: as in `paged_attend`.
        mesh: as in `paged_attend`. XLA does not cut kernels. Heads are cut in stretches, so query heads stay with the
            key head that they read; what is closed over is whole on every device.
    """

    def attend(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: KVCache) -> tuple[Queries, KVCache]:
        table = page_table + layer * carried.num_pages
        pools = carried.k.reshape(-1, *carried.k.shape[2:]), carried.v.reshape(-1, *carried.v.shape[2:])
        how = {"body": kernels.paged_attention, "interpret": kernels.interpret}
        pools = write_pages(pools, (k, v), table, start, **how)
        mixed = read(q, pools, table, how)
        return mixed, KVCache(pools[0].reshape(carried.k.shape), pools[1].reshape(carried.v.shape))

    if mesh is None:
        return attend
    heads = P(None, None, "tensor")
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(heads, heads, heads, P(), POOL_SPEC), out_specs=(heads, POOL_SPEC), check_vma=False
    )
