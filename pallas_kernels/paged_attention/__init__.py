"""Attention of a few new tokens per request over a paged KV cache, and the writes into its pages: the contract.

A pool of pages holds the keys and values of all requests, head-major: `[P, K, page, H]`. `page_table[b, i]` names the
page that holds slots [i * page, (i + 1) * page) of request b. New tokens are written first and then read back through
the same pages as everything else, so the order of summation over slots is the same in whichever forward a token
arrives.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bodies import Body
from pallas_kernels.paged_attention import jax_triton, page_walk, reference, tpu, triton
from pallas_kernels.paged_attention.rows import MAX_TREE_ROWS
from pallas_kernels.paged_attention.tiles import TpuTiles, TritonTiles


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int[Array, "B pages"],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"] | None = None,
    *,
    body: Body = Body.REFERENCE,
    interpret: bool = False,
    tiles: TritonTiles | TpuTiles | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of new tokens: softmax(q k^T / sqrt(H)) v over the slots a row sees.

    Row t of request b stands at slot `context_len[b] + t` and sees every slot below `context_len[b]`, and slot
    `context_len[b] + u` where `visible[b, t, u]`. Scores, softmax and accumulation are float32.

    Args:
        q: rotated queries of the new tokens; query head n reads key head n // (N / K).
        k_pages: rotated keys; those of the new tokens are already written (`write_pages`).
        v_pages: values.
        page_table: pages of each request, in order. Entries behind the last slot in use must name some page, whose
            content is never read.
        context_len: slots in use before the new tokens; 0 or more. The caller guarantees that `context_len + T`
            slots exist.
        visible: which new tokens each new token sees, for trees and windows of up to 64 rows; later tokens are never
            seen, whatever it says. None is strictly causal, for any T. A row that sees no slot at all returns 0.
        body: implementation.
        interpret: run a Pallas body in the interpreter.
        tiles: instead of the body's tile table.

    Returns:
        In the dtype of `q`.

    Raises:
        ValueError: shapes disagree, N is no multiple of K, or `visible` has more than 64 rows.
        TypeError: `q` and the pages differ in dtype or are not floating, or an index is not of integers.
        NotImplementedError: the body cannot do the shape, or its packages are not installed.

    Source: flash-decoding with splits of fixed size. differs: a T x T mask over the new tokens, and any number of
    query tokens through the split path.
    """
    check_pages(k_pages, v_pages, page_table)
    batch, rows, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    if head_dim != k_pages.shape[3]:
        raise ValueError(f"{q.shape=} has heads of {head_dim}, but {k_pages.shape=} of {k_pages.shape[3]}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if page_table.shape[0] != batch or context_len.shape != (batch,):
        raise ValueError(f"{page_table.shape=} and {context_len.shape=}, but {q.shape=} has {batch} requests")
    if q.dtype != k_pages.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"{q.dtype=} and {k_pages.dtype=} must be the same floating dtype")
    if not jnp.issubdtype(context_len.dtype, jnp.integer):
        raise TypeError(f"{context_len.dtype=} is not an integer dtype")
    if visible is not None and visible.shape != (batch, rows, rows):
        raise ValueError(f"{visible.shape=}, but {q.shape=} needs {(batch, rows, rows)}")
    if visible is not None and rows > MAX_TREE_ROWS:
        raise ValueError(
            f"{rows} rows with an explicit mask: at most {MAX_TREE_ROWS}; pass visible=None for causal rows"
        )
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool)), (batch, rows, rows))
    visible = None if visible is None else visible & causal
    match body:
        case Body.REFERENCE:
            mask = causal if visible is None else visible
            return reference.paged_attention(q, k_pages, v_pages, page_table, context_len, mask)
        case Body.PAGE_WALK:
            return page_walk.paged_attention(q, k_pages, v_pages, page_table, context_len, visible)
        case Body.TRITON | Body.JAX_TRITON:
            if not isinstance(tiles, TritonTiles | None):
                raise TypeError(f"{tiles=} are not TritonTiles")
            module = triton if body is Body.TRITON else jax_triton
            return module.paged_attention(
                q, k_pages, v_pages, page_table, context_len, visible, tiles=tiles, interpret=interpret
            )
        case Body.TPU:
            if not isinstance(tiles, TpuTiles | None):
                raise TypeError(f"{tiles=} are not TpuTiles")
            return tpu.paged_attention(
                q, k_pages, v_pages, page_table, context_len, visible, tiles=tiles, interpret=interpret
            )


def write_pages(
    pages: tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]],
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
    *,
    body: Body = Body.REFERENCE,
    interpret: bool = False,
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Puts the keys and values of new token t of request b at slot `start[b] + t`, in place where `pages` are donated.

    Args:
        pages: key and value pages. Pallas bodies alias them to the result, the reference leaves that to XLA.
        new: keys and values of the new tokens.
        page_table: pages of each request. Requests may share a page only if nobody reads it (a page for idle slots).
        start: slot of each request's first new token. The caller guarantees that `start + T` slots exist.
        body: implementation.
        interpret: run a Pallas body in the interpreter.

    Raises:
        ValueError: shapes disagree.
        TypeError: the page table or `start` is not of integers.
        NotImplementedError: the body cannot do the shape, or its packages are not installed.
    """
    check_pages(*pages, page_table)
    batch, _, kv_heads, head_dim = new[0].shape
    if new[0].shape != new[1].shape or (kv_heads, head_dim) != (pages[0].shape[1], pages[0].shape[3]):
        raise ValueError(f"{new[0].shape=} and {new[1].shape=} do not fit {pages[0].shape=}")
    if page_table.shape[0] != batch or start.shape != (batch,):
        raise ValueError(f"{page_table.shape=} and {start.shape=}, but {new[0].shape=} has {batch} requests")
    if not jnp.issubdtype(start.dtype, jnp.integer):
        raise TypeError(f"{start.dtype=} is not an integer dtype")
    match body:
        case Body.REFERENCE | Body.PAGE_WALK:
            module = reference if body is Body.REFERENCE else page_walk
            k_pages, v_pages = (
                module.write_pages(of_kind, tokens, page_table, start)
                for of_kind, tokens in zip(pages, new, strict=True)
            )
            return k_pages, v_pages
        case Body.TRITON | Body.JAX_TRITON:
            module = triton if body is Body.TRITON else jax_triton
            return module.write_pages(pages, new, page_table, start, interpret=interpret)
        case Body.TPU:
            return tpu.write_pages(pages, new, page_table, start, interpret=interpret)


def check_pages(k_pages: Array, v_pages: Array, page_table: Array) -> None:
    """Raises ValueError or TypeError where a pool and a page table are malformed."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"{k_pages.shape=} and {v_pages.shape=} must be one [P, K, page, H]")
    if k_pages.dtype != v_pages.dtype:
        raise TypeError(f"{k_pages.dtype=} and {v_pages.dtype=} differ")
    if page_table.ndim != 2:
        raise ValueError(f"{page_table.shape=} must be [B, pages]")
    if not jnp.issubdtype(page_table.dtype, jnp.integer):
        raise TypeError(f"{page_table.dtype=} is not an integer dtype")
