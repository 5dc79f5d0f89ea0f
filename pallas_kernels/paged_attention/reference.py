"""Paged attention in plain jnp: pages are gathered into one sequence per request, masks are explicit."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def write_pages(
    pages: Shaped[Array, "P K page H"],
    new: Shaped[Array, "B T K H"],
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
) -> Shaped[Array, "P K page H"]:
    """Puts new row t of request b at slot `start[b] + t`; see the package for the contract."""
    page_size = pages.shape[2]
    if new.shape[:2] == (1, 1):
        # XLA makes the write of one row an update that it repeats inside the reads behind it; the old pool is then
        # still wanted, and copied: 340 ms a token for AR at batch 1 on a pool of 340 MB, 4 ms with the row twice.
        new, page_table, start = (jnp.concatenate([each, each]) for each in (new, page_table, start))
    slots = start[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    page_ids = jnp.take_along_axis(page_table, slots // page_size, axis=1)
    return pages.at[page_ids, :, slots % page_size].set(new.astype(pages.dtype))


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int[Array, "B pages"],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"],
) -> Float[Array, "B T N H"]:
    """The op as its contract states it; see the package for arguments and rules."""
    batch, rows, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    num_slots = page_table.shape[1] * page_size
    k, v = (
        jnp.moveaxis(pages[page_table], 2, 1).reshape(batch, kv_heads, num_slots, head_dim).astype(jnp.float32)
        for pages in (k_pages, v_pages)
    )
    # Slot of every key, relative to the first new row; the context lies below 0.
    new_row = jnp.arange(num_slots, dtype=jnp.int32)[None] - context_len[:, None]
    among_new = jnp.take_along_axis(visible, jnp.clip(new_row, 0, rows - 1)[:, None], axis=2)
    mask = (new_row < 0)[:, None] | ((new_row < rows)[:, None] & among_new)

    grouped = q.astype(jnp.float32).reshape(batch, rows, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probs = weights / jnp.where(total > 0, total, 1.0)
    # 0 * NaN is NaN: what nobody has written yet must not reach the product.
    is_written = jnp.any(mask, axis=1)[:, None, :, None]
    mixed = jnp.einsum("BKGTS,BKSH->BTKGH", probs, jnp.where(is_written, v, 0.0))
    return mixed.reshape(batch, rows, heads, head_dim).astype(q.dtype)
