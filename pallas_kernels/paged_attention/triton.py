"""Paged attention through Pallas' Triton backend (NVIDIA sm_80 and newer): split-KV, then a combine in fixed order.

`_attend`: grid (B * K, row tiles, splits). A program holds `rows` query rows of one key head (q, mixed: float32 in
registers, 2 * rows * H * 4 bytes over its warps) and walks the keys of its split in tiles of `keys` positions; each
key and value tile (keys * H elements) is staged `num_stages` deep in shared memory.  Programs whose split lies behind
the last slot that their rows may see end at once and write nothing.

`_combine`: grid (B * K, row tiles). Adds the partial results of the splits that hold a key, first to last.

`write_pages`: grid (B, T). Copies one token's keys and values of all heads into its page, in place.

Nothing is atomic and every order of summation is fixed by absolute position: outputs are bitwise equal between runs,
and do not depend on the batch, on capacity or on other requests. They do not depend on T either, as far as a matrix
product of one row does not depend on the number of rows (`tiles.rows` is the only thing that changes with it).

Refuses: head sizes and page sizes other than powers of two from 16 (a tile lies in one page, and a product needs 16
rows of keys).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bodies import Body, device_kind
from pallas_kernels.paged_attention.checks import check_triton_pages
from pallas_kernels.paged_attention.maths import Running, attend_tile, finish, is_visible, merge, nothing_seen
from pallas_kernels.paged_attention.rows import num_new_seen, pack_limits
from pallas_kernels.paged_attention.tiles import TRITON, TritonTiles


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int[Array, "B pages"],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"] | None,
    *,
    tiles: TritonTiles | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """The op as its contract states it; see the package for arguments and rules."""
    check_triton_pages(k_pages, Body.TRITON)
    tiles = tiles or TRITON.get(device_kind(), TritonTiles())
    batch, tokens, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    num_rows = tokens * heads // kv_heads
    tile_rows = min(tiles.rows, max(16, pl.next_power_of_2(num_rows)))
    padded_rows = num_rows + -num_rows % tile_rows
    num_splits = pl.cdiv(page_table.shape[1] * page_size, tiles.split)
    geometry = Geometry(tokens, heads // kv_heads, kv_heads, tiles.split)
    # In [B, T, K, G, H] no query has to be moved: rows are addressed one by one.
    queries = q.reshape(batch, tokens, kv_heads, geometry.groups, head_dim)

    def partial_spec(*width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tile_rows, *width), lambda i, r, s: (i, s, r, *(0 for _ in width)))

    partials = pl.pallas_call(
        functools.partial(_attend, geometry=geometry, tile_keys=min(tiles.keys, page_size)),  # a tile lies in one page
        grid=(batch * kv_heads, padded_rows // tile_rows, num_splits),
        in_specs=[pl.no_block_spec] * 8,
        out_specs=[partial_spec(), partial_spec(), partial_spec(head_dim)],
        out_shape=[
            jax.ShapeDtypeStruct((batch * kv_heads, num_splits, padded_rows), jnp.float32),
            jax.ShapeDtypeStruct((batch * kv_heads, num_splits, padded_rows), jnp.float32),
            jax.ShapeDtypeStruct((batch * kv_heads, num_splits, padded_rows, head_dim), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="paged_attention",
    )(context_len, page_table, *pack_limits(visible, batch, tokens), queries, k_pages, v_pages)

    # Rows of a request are independent here, so narrower tiles only add programs: 16 rows keep a batch of one busy.
    combine_rows = min(tile_rows, 16)
    mixed = pl.pallas_call(
        functools.partial(_combine, geometry=geometry, tile_rows=combine_rows),
        grid=(batch * kv_heads, padded_rows // combine_rows),
        in_specs=[pl.no_block_spec] * 4,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=2, num_stages=2),
        interpret=interpret,
        name="paged_attention_combine",
    )(context_len, *partials)
    return mixed.reshape(q.shape)


class Geometry(NamedTuple):
    """The static numbers that both kernels need."""

    tokens: int  # T
    groups: int  # G
    kv_heads: int  # K
    split: int

    def rows_of(self, tile: Int[Array, ""], tile_rows: int) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
        """Token and head of the group of each row of a tile.

        Rows past the last repeat it: they load valid memory, compute the same bits and store them once more.
        """
        row = jnp.minimum(tile * tile_rows + jax.lax.iota(jnp.int32, tile_rows), self.tokens * self.groups - 1)
        return row // self.groups, row % self.groups


def _attend(
    context_len_ref,
    page_table_ref,
    last_row_ref,
    low_bits_ref,
    high_bits_ref,
    q_ref,
    k_ref,
    v_ref,
    top_ref,
    total_ref,
    mixed_ref,
    *,
    geometry: Geometry,
    tile_keys: int,
):
    request, head = pl.program_id(0) // geometry.kv_heads, pl.program_id(0) % geometry.kv_heads
    page_size, head_dim = k_ref.shape[2:]
    rows = mixed_ref.shape[0]
    first_key = pl.program_id(2) * geometry.split
    context_len = context_len_ref[request]
    seen = num_new_seen(pl.program_id(1), rows, geometry.groups, geometry.tokens)
    end = jnp.minimum(context_len + seen, first_key + geometry.split)
    token, group = geometry.rows_of(pl.program_id(1), rows)
    q = q_ref[request, token, head, group, :]
    last_row, low_bits, high_bits = (
        ref[request, token][:, None] for ref in (last_row_ref, low_bits_ref, high_bits_ref)
    )
    offsets = jax.lax.iota(jnp.int32, tile_keys)

    def tile(number: Int[Array, ""], running: Running) -> Running:
        first = first_key + number * tile_keys
        keys = first + offsets
        page = page_table_ref[request, first // page_size]
        inside = pl.ds(first % page_size, tile_keys)
        # Nobody may have written the slots behind the end, and 0 * NaN is NaN.
        is_used = jnp.broadcast_to((keys < end)[:, None], (tile_keys, head_dim))
        k, v = (pltriton.load(ref.at[page, head, inside, :], mask=is_used, other=0.0) for ref in (k_ref, v_ref))
        # The mask is applied to committed tiles too: without it the compiler may contract other operations into FMAs,
        # and a token would get other bits when a tile in front of it becomes wholly committed.
        visible = is_visible(keys[None, :], context_len, last_row, low_bits, high_bits)
        return attend_tile(running, q, k, v, visible)

    @pl.when(first_key < end)
    def _():
        num_tiles = (end - first_key + tile_keys - 1) // tile_keys
        running = jax.lax.fori_loop(0, num_tiles, tile, nothing_seen(rows, head_dim))
        top_ref[...] = running.top[:, 0]
        total_ref[...] = running.total[:, 0]
        mixed_ref[...] = running.mixed


def _combine(context_len_ref, top_ref, total_ref, mixed_ref, out_ref, *, geometry: Geometry, tile_rows: int):
    request, head = pl.program_id(0) // geometry.kv_heads, pl.program_id(0) % geometry.kv_heads
    pair, tile = pl.program_id(0), pl.program_id(1)
    rows = pl.ds(tile * tile_rows, tile_rows)
    end = context_len_ref[request] + num_new_seen(tile, tile_rows, geometry.groups, geometry.tokens)

    def add(number: Int[Array, ""], running: Running) -> Running:
        top, total = top_ref[pair, number, rows][:, None], total_ref[pair, number, rows][:, None]
        return merge(running, Running(top, total, mixed_ref[pair, number, rows, :]))

    num_splits = (end + geometry.split - 1) // geometry.split
    running = jax.lax.fori_loop(0, num_splits, add, nothing_seen(tile_rows, out_ref.shape[4]))
    token, group = geometry.rows_of(tile, tile_rows)
    out_ref[request, token, head, group, :] = finish(running).astype(out_ref.dtype)


def write_pages(
    pages: tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]],
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Writes keys and values in one launch; `pages` are aliased to the result."""
    check_triton_pages(pages[0], Body.TRITON)
    batch, tokens, kv_heads, head_dim = new[0].shape
    token = pl.BlockSpec((None, None, kv_heads, head_dim), lambda b, t: (b, t, 0, 0))
    k_pages, v_pages = pl.pallas_call(
        functools.partial(_write, page_size=pages[0].shape[2]),
        grid=(batch, tokens),
        in_specs=[pl.no_block_spec] * 2 + [token] * 2 + [pl.no_block_spec] * 2,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in pages],
        input_output_aliases={4: 0, 5: 1},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_pages",
    )(start, page_table, *new, *pages)
    return k_pages, v_pages


def _write(start_ref, page_table_ref, new_k_ref, new_v_ref, old_k_ref, old_v_ref, k_ref, v_ref, *, page_size: int):
    del old_k_ref, old_v_ref  # the same memory as the outputs
    request, token = pl.program_id(0), pl.program_id(1)
    slot = start_ref[request] + token
    page = page_table_ref[request, slot // page_size]
    for head in range(new_k_ref.shape[0]):  # one row of H at a time: K need not be a power of two
        k_ref[page, head, slot % page_size, :] = new_k_ref[head, :].astype(k_ref.dtype)
        v_ref[page, head, slot % page_size, :] = new_v_ref[head, :].astype(v_ref.dtype)
