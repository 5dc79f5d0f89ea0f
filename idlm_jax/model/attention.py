"""Grouped-query attention with per-head query/key RMSNorm, and the functions that decide what it attends to.

A block does not know whether it trains, prefills or decodes: it hands its rotated queries, keys and values to an
`Attend` and adds what comes back. Masks are boolean with True = may attend.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.array_types import Hidden, Keys, Queries, RowGate
from idlm_jax.config import ModelConfig
from idlm_jax.model.layers import Projection, RMSNorm, apply_rope

# `half` is H // 2; jaxtyping cannot derive one argument's axis from an axis that no earlier argument has bound.
RopeTables = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


@runtime_checkable  # beartype checks every hint when the tests run
class Attend(Protocol):
    """Mixes values for one layer; `layer_input` is that layer's slice of whatever the caller scans over."""

    def __call__(self, q: Queries, k: Keys, v: Keys, layer_input: Any) -> tuple[Queries, Any]: ...


class Attention(nnx.Module):
    """Projections, norms and rotation around an `Attend`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = (config.hidden_size,)
        query_heads = (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        self.q = Projection(width, query_heads, config, rngs=rngs)
        self.k = Projection(width, kv_heads, config, rngs=rngs)
        self.v = Projection(width, kv_heads, config, rngs=rngs)
        self.o = Projection(query_heads, width, config, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config)
        self.k_norm = RMSNorm(config.head_dim, config)

    def __call__(
        self, x: Hidden, rope: RopeTables, attend: Attend, layer_input: Any, lora_gate: RowGate | None
    ) -> tuple[Hidden, Any]:
        q = apply_rope(self.q_norm(self.q(x, lora_gate)), rope)
        k = apply_rope(self.k_norm(self.k(x, lora_gate)), rope)
        mixed, layer_output = attend(q, k, self.v(x, lora_gate), layer_input)
        return self.o(mixed, lora_gate), layer_output


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


def window_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    cache: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"],
) -> Queries:
    """Attends to the committed context in the cache and to those new rows that `visible` names.

    The new rows are read from `k` and `v`, not from the cache, so the cache stays read-only inside the layer scan
    and MASK rows need not be written at all.

    Args:
        q: rotated queries of the window.
        k: rotated keys of the window.
        v: values of the window.
        cache: keys and values of one layer; entries at or past `context_len` are stale and never read.
        context_len: committed tokens per request.
        visible: row t may attend to new row u.
    """
    cached_k, cached_v = cache
    batch, rows = q.shape[:2]
    in_context = jnp.arange(cached_k.shape[1])[None] < context_len[:, None]
    mask = jnp.concatenate([jnp.broadcast_to(in_context[:, None], (batch, rows, cached_k.shape[1])), visible], axis=-1)
    return masked_attention(q, jnp.concatenate([cached_k, k], axis=1), jnp.concatenate([cached_v, v], axis=1), mask)


def causal_attend(visible: Bool[Array, "B T T"]) -> Attend:
    """Attention among the given rows alone; hands back their keys and values for a cache."""

    def attend(q: Queries, k: Keys, v: Keys, layer_input: Any) -> tuple[Queries, Any]:
        del layer_input
        return masked_attention(q, k, v, visible), (k, v)

    return attend


def window_attend(context_len: Int[Array, " B"], visible: Bool[Array, "B T T"]) -> Attend:
    """Attention over one layer's cache and the window; hands back the window's keys and values."""

    def attend(q: Queries, k: Keys, v: Keys, layer_input: Any) -> tuple[Queries, Any]:
        return window_attention(q, k, v, layer_input, context_len, visible), (k, v)

    return attend
