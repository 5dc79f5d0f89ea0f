"""Named real workloads: what the tests compile, what the benchmarks time, what the tile table is tuned for."""

import dataclasses
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of the op.

    Attributes:
        batch: requests, B.
        tokens: new tokens per request, T.
        heads: query heads, N.
        kv_heads: key heads, K.
        head_dim: width of a head, H.
        page_size: slots per page.
        capacity: slots that a request's row of the page table covers.
        context_len: slots in use before the new tokens, of every request.
        is_tree: an explicit mask over the new tokens instead of the causal one.
        dtype: of queries and pages.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    page_size: int = 64
    capacity: int
    context_len: int
    is_tree: bool = False
    dtype: str = "bfloat16"

    @property
    def pages_per_request(self) -> int:
        return self.capacity // self.page_size

    @property
    def num_pages(self) -> int:
        """Only as many as the contexts fill: a pool is shared, it is not batch times capacity."""
        in_use = -(-(self.context_len + self.tokens) // self.page_size)
        return self.batch * in_use

    @property
    def num_bytes(self) -> int:
        """Bytes that must cross memory: keys and values once, queries in, output out."""
        slots = self.batch * (self.context_len + self.tokens) * self.kv_heads * 2
        rows = self.batch * self.tokens * self.heads * 2
        return (slots + rows) * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def num_flops(self) -> int:
        """Two matrix products over every slot."""
        return 4 * self.batch * self.tokens * self.heads * (self.context_len + self.tokens) * self.head_dim

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arguments of `paged_attention`, as shapes."""
        pool = (self.num_pages, self.kv_heads, self.page_size, self.head_dim)
        dtype = jnp.dtype(self.dtype)
        arguments = {
            "q": jax.ShapeDtypeStruct((self.batch, self.tokens, self.heads, self.head_dim), dtype),
            "k_pages": jax.ShapeDtypeStruct(pool, dtype),
            "v_pages": jax.ShapeDtypeStruct(pool, dtype),
            "page_table": jax.ShapeDtypeStruct((self.batch, self.pages_per_request), jnp.int32),
            "context_len": jax.ShapeDtypeStruct((self.batch,), jnp.int32),
        }
        if self.is_tree:
            arguments["visible"] = jax.ShapeDtypeStruct((self.batch, self.tokens, self.tokens), jnp.bool_)
        return arguments

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Random arguments, pages in random order; a tree is a random subset of the causal mask."""
        keys = jax.random.split(jax.random.key(seed), 3)
        random = np.random.default_rng(seed)
        shapes = self.abstract()
        arguments: dict[str, Any] = {
            name: jax.random.normal(key, shapes[name].shape, shapes[name].dtype)
            for name, key in zip(("q", "k_pages", "v_pages"), keys, strict=True)
        }
        table = np.zeros((self.batch, self.pages_per_request), np.int32)
        in_use = self.num_pages // self.batch
        table[:, :in_use] = random.permutation(self.num_pages).reshape(self.batch, in_use)
        arguments["page_table"] = jnp.asarray(table)
        arguments["context_len"] = jnp.full((self.batch,), self.context_len, jnp.int32)
        if self.is_tree:
            own = np.eye(self.tokens, dtype=bool)
            arguments["visible"] = jnp.asarray(
                own | np.tril(random.random((self.batch, self.tokens, self.tokens)) < 0.7)
            )
        return arguments


# A window of stride 4 in the middle of eight requests of 8k tokens, and what else is decoded.
ISD_8B = Shape(batch=8, tokens=7, heads=32, kv_heads=8, capacity=32_768, context_len=8_192)

SHAPES = {
    "8b_ar_b1_8k": replace(ISD_8B, batch=1, tokens=1),
    "8b_isd4_b1_1k": replace(ISD_8B, batch=1, context_len=1_024),
    "8b_isd4_b1_8k": replace(ISD_8B, batch=1),
    "8b_isd4_b1_32k": replace(ISD_8B, batch=1, context_len=32_700),
    "8b_isd4_b8_8k": ISD_8B,
    "8b_isd4_b64_8k": replace(ISD_8B, batch=64),
    "8b_isd8_b8_8k": replace(ISD_8B, tokens=15),
    "8b_tree16_b8_8k": replace(ISD_8B, tokens=16, is_tree=True),
    "8b_tree64_b1_8k": replace(ISD_8B, batch=1, tokens=64, is_tree=True),
    "8b_chunk256_b1_8k": replace(ISD_8B, batch=1, tokens=256),
    "8b_isd4_b8_8k_page16": replace(ISD_8B, page_size=16),
    "0p6b_isd4_b8_8k": replace(ISD_8B, heads=16),
    "14b_isd4_b8_8k": replace(ISD_8B, heads=40),  # groups of 5: rows are no power of two
    "32b_isd4_b8_8k": replace(ISD_8B, heads=64),
    "head64_isd4_b8_8k": replace(ISD_8B, head_dim=64),
    "8b_isd4_b8_8k_float32": replace(ISD_8B, dtype="float32"),
}
