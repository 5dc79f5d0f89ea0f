"""Contiguous KV cache: one buffer per kind for all layers, written in place, trimmed by a length and nothing else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idlm_jax.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of committed tokens.

    The cache has no length of its own: the owner keeps `context_len` per request, entries in [0, context_len) are
    committed, and everything behind is stale and will be overwritten. A rejected token is therefore dropped by
    not moving the length.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]

    @property
    def layers(self) -> tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
        """The pair that the layer scan slices."""
        return self.k, self.v


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> KVCache:
    """Zeros for `batch` requests of at most `capacity` tokens, in the compute dtype."""
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.compute), jnp.zeros(shape, config.compute))


def write(
    cache: KVCache, k: Float[Array, "L B T K H"], v: Float[Array, "L B T K H"], start: Int[Array, " B"]
) -> KVCache:
    """Puts the T new entries of request b at [start[b], start[b] + T).

    The caller guarantees start + T <= S: `dynamic_update_slice` would otherwise move the write, not refuse it.
    """

    def one_request(buffer: Array, new: Array, at: Array) -> Array:
        zero = jnp.zeros_like(at)
        return jax.lax.dynamic_update_slice(buffer, new, (zero, at, zero, zero))

    put = jax.vmap(one_request, in_axes=(1, 1, 0), out_axes=1)
    return KVCache(put(cache.k, k, start), put(cache.v, v, start))
