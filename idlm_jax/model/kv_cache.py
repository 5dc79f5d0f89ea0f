"""Paged KV cache: one pool of pages per kind for all layers, written in place, trimmed by a length and nothing else."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from idlm_jax.config import ModelConfig

# 64 slots of 128 bfloat16 are 16 KiB a head: one tile of the kernels, and little to waste at the end of a request.
PAGE_SIZE = 64

# A pool over a mesh: every device holds its key heads of every page, so page tables are the same everywhere.
POOL_SPEC = PartitionSpec(None, None, "tensor")


class KVCache(NamedTuple):
    """Keys and values of committed tokens, and of rows that may still be rejected.

    A pool knows neither requests nor lengths: the owner keeps a page table and a `context_len` per request. Slots in
    [0, context_len) are committed, everything behind is stale and will be overwritten. A rejected token is therefore
    dropped by not moving the length.

    Every layer has the same pages, so layer l of a pool viewed as [L * P, ...] is the page table plus l * P: no layer
    is ever sliced out.
    """

    k: Float[Array, "L P K page H"]
    v: Float[Array, "L P K page H"]

    @property
    def num_pages(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[3]


def empty_cache(config: ModelConfig, num_pages: int, page_size: int = PAGE_SIZE) -> KVCache:
    """Zeros for `num_pages` pages per layer, in the compute dtype."""
    shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
    return KVCache(jnp.zeros(shape, config.compute), jnp.zeros(shape, config.compute))


def contiguous_pages(batch: int, pages_per_request: int) -> Int[Array, "B pages"]:
    """The page table of a pool that is cut into one equal stretch per request."""
    return jnp.arange(batch * pages_per_request, dtype=jnp.int32).reshape(batch, pages_per_request)
