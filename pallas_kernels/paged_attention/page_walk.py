"""Paged attention in plain jnp with the kernels' order of summation: page after page, online softmax.

Every page is a tile at an absolute position, and a page that a row does not see is an exact no-op for it, so the bits
of a row depend on neither the width of the page table nor the other requests. The reference gathers whole tables, so
its sums follow their width. For platforms without a kernel, where bits must not change with capacity.

bfloat16 pages are written and fetched as bits: XLA's CPU compiler has no scatter and no gather of bfloat16, and would
convert the whole pool there and back in every layer (batch 32 of the tiny model took twice as long).

The loop ends behind the largest context of the batch. Rows are padded to whole tiles of 16, so that a product over few
rows has the shape of one over more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.maths import Running, attend_tile, finish, is_visible, nothing_seen
from pallas_kernels.paged_attention.rows import pack_limits, pack_queries, unpack_rows

TILE_ROWS = 16


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int[Array, "B pages"],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"] | None,
) -> Float[Array, "B T N H"]:
    """The op as its contract states it; see the package for arguments and rules."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    queries = pack_queries(q, kv_heads, TILE_ROWS)
    num_rows = queries.shape[2]
    padding = num_rows - tokens * (heads // kv_heads)
    # Padded rows see the context and nothing else.
    last_row, low_bits, high_bits = (
        jnp.pad(jnp.repeat(of_token, heads // kv_heads, axis=1), ((0, 0), (0, padding)), constant_values=fill)[
            ..., None
        ]
        for of_token, fill in zip(pack_limits(visible, batch, tokens), (-1, 0, 0), strict=True)
    )
    end = context_len + tokens

    def tile(number: Int[Array, ""], running: Running) -> Running:
        keys = number * page_size + jnp.arange(page_size, dtype=jnp.int32)
        pages = page_table[:, number]
        # Nobody may have written the slots behind the end, and 0 * NaN is NaN.
        is_used = (keys[None] < end[:, None])[:, None, :, None]
        k, v = (jnp.where(is_used, _bits(pool)[pages].view(pool.dtype), 0) for pool in (k_pages, v_pages))
        seen = jax.vmap(is_visible, in_axes=(None, 0, 0, 0, 0))(keys[None], context_len, last_row, low_bits, high_bits)
        of_heads = jax.vmap(attend_tile, in_axes=(0, 0, 0, 0, None))
        return jax.vmap(of_heads)(running, queries, k, v, seen)

    start = nothing_seen(num_rows, head_dim)
    running = jax.tree.map(lambda x: jnp.broadcast_to(x[None, None], (batch, kv_heads, *x.shape)), start)
    running = jax.lax.fori_loop(0, (jnp.max(end) + page_size - 1) // page_size, tile, running)
    mixed = jax.vmap(jax.vmap(finish))(running).astype(q.dtype)
    return unpack_rows(mixed, tokens, heads)


def write_pages(
    pages: Float[Array, "P K page H"],
    new: Float[Array, "B T K H"],
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
) -> Float[Array, "P K page H"]:
    """Puts new row t of request b at slot `start[b] + t`; see the package for the contract."""
    bits = reference.write_pages(_bits(pages), _bits(new.astype(pages.dtype)), page_table, start)
    return bits.view(pages.dtype)


def _bits(x: Float[Array, "..."]) -> Shaped[Array, "..."]:
    return x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x
