"""Paged attention through Pallas' Mosaic backend for TPU: one core walks the pages of a request in order.

`_attend`: grid (B, row tiles, steps). A step fetches `pages_per_step` pages of keys and of values, all K heads of
them, and adds them to the state of K * rows query rows. VMEM: 2 (double buffering) * 2 * pages_per_step * K * page * H
elements of pages, and K * rows * (H + 2 * 128) float32 of state. The page table and the lengths are prefetched
scalars, so that the index maps name pages; steps behind the request's last slot name the page that is already there,
which costs no transfer, and are skipped.

`_write`: grid (B, pages that T tokens may touch). Reads a page, replaces the rows that are new, and writes it back in
place.

Refuses: page sizes that are no multiple of 16 (the sublane tile of bfloat16).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bodies import Body, device_kind, refuse
from pallas_kernels.paged_attention.maths import Running, attend_tile, finish, is_visible, nothing_seen
from pallas_kernels.paged_attention.rows import num_new_seen, pack_limits, pack_queries, unpack_rows
from pallas_kernels.paged_attention.tiles import TPU, TpuTiles
from pallas_kernels.tpu_interpreter import interpreter

BODIES = tuple(Body)
LANES = 128


def check_supported(k_pages: Float[Array, "P K page H"]) -> None:
    """Raises NotImplementedError for pages that do not fill whole tiles."""
    if k_pages.shape[2] % 16:
        raise refuse("paged_attention", Body.TPU, f"needs a page size that 16 divides, not {k_pages.shape[2]}", BODIES)


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int[Array, "B pages"],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"] | None,
    *,
    tiles: TpuTiles | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """The op as its contract states it; see the package for arguments and rules."""
    check_supported(k_pages)
    tiles = tiles or TPU.get(device_kind(), TpuTiles())
    batch, tokens, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    groups = heads // kv_heads
    num_rows = tokens * groups
    tile_rows = min(tiles.rows, num_rows + -num_rows % 16)
    rows = pack_queries(q, kv_heads, tile_rows)
    # Per query row, a column per kind of number: the kernel needs them along sublanes. Padded rows see nothing new.
    limits = jnp.repeat(jnp.stack(pack_limits(visible, batch, tokens), axis=2), groups, axis=1)
    limits = jnp.pad(limits, ((0, 0), (0, rows.shape[2] - num_rows), (0, 0)), constant_values=-1)
    pages_per_step = min(tiles.pages_per_step, page_table.shape[1])
    num_steps = pl.cdiv(page_table.shape[1], pages_per_step)

    def page_spec(offset: int) -> pl.BlockSpec:
        def index(b, r, step, table, context_len):
            last = (context_len[b] + num_new_seen(r, tile_rows, groups, tokens) - 1) // page_size
            return table[b, jnp.minimum(step * pages_per_step + offset, last)], 0, 0, 0

        return pl.BlockSpec((None, kv_heads, page_size, head_dim), index)

    q_spec = pl.BlockSpec((None, kv_heads, tile_rows, head_dim), lambda b, r, step, *_: (b, 0, r, 0))
    mixed = pl.pallas_call(
        functools.partial(_attend, num_new=tokens, groups=groups, page_size=page_size, pages_per_step=pages_per_step),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, rows.shape[2] // tile_rows, num_steps),
            in_specs=[
                pl.BlockSpec((None, tile_rows, limits.shape[2]), lambda b, r, step, *_: (b, r, 0)),
                q_spec,
                *[page_spec(offset) for offset in range(pages_per_step)] * 2,
            ],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((kv_heads, tile_rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, tile_rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, tile_rows, head_dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpreter(interpret),
        name="paged_attention",
    )(page_table, context_len, limits, rows, *[k_pages] * pages_per_step, *[v_pages] * pages_per_step)
    return unpack_rows(mixed, tokens, heads)


def _attend(
    page_table_ref,
    context_len_ref,
    limits_ref,
    q_ref,
    *refs,
    num_new: int,
    groups: int,
    page_size: int,
    pages_per_step: int,
):
    del page_table_ref
    k_refs, v_refs = refs[:pages_per_step], refs[pages_per_step : 2 * pages_per_step]
    out_ref, top_ref, total_ref, mixed_ref = refs[2 * pages_per_step :]
    request, step = pl.program_id(0), pl.program_id(2)
    kv_heads, rows, head_dim = q_ref.shape
    context_len = context_len_ref[request]
    end = context_len + num_new_seen(pl.program_id(1), rows, groups, num_new)

    @pl.when(step == 0)
    def _():
        state = nothing_seen(rows, head_dim)
        for head in range(kv_heads):
            top_ref[head] = jnp.broadcast_to(state.top, (rows, LANES))
            total_ref[head] = jnp.broadcast_to(state.total, (rows, LANES))
            mixed_ref[head] = state.mixed

    for number, (k_ref, v_ref) in enumerate(zip(k_refs, v_refs, strict=True)):
        first_key = (step * pages_per_step + number) * page_size

        @pl.when(first_key < end)
        def _(k_ref=k_ref, v_ref=v_ref, first_key=first_key):
            keys = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, page_size), 1)
            slots = first_key + jax.lax.broadcasted_iota(jnp.int32, (page_size, 1), 0)
            last_row, low_bits, high_bits = (limits_ref[:, column : column + 1] for column in range(3))
            visible = is_visible(keys, context_len, last_row, low_bits, high_bits)
            for head in range(kv_heads):
                running = Running(top_ref[head, :, :1], total_ref[head, :, :1], mixed_ref[head])
                # Slots behind the end may hold anything, and 0 * NaN is NaN.
                v = jnp.where(slots < end, v_ref[head], jnp.zeros_like(v_ref[head]))
                running = attend_tile(running, q_ref[head], k_ref[head], v, visible)
                top_ref[head] = jnp.broadcast_to(running.top, (rows, LANES))
                total_ref[head] = jnp.broadcast_to(running.total, (rows, LANES))
                mixed_ref[head] = running.mixed

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for head in range(kv_heads):
            running = Running(top_ref[head, :, :1], total_ref[head, :, :1], mixed_ref[head])
            out_ref[head] = finish(running).astype(out_ref.dtype)


def write_pages(
    pages: tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]],
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Writes keys and values in one launch; `pages` are aliased to the result."""
    check_supported(pages[0])
    batch, tokens, kv_heads, head_dim = new[0].shape
    page_size = pages[0].shape[2]
    padding = -tokens % 16
    by_head = [
        jnp.pad(jnp.moveaxis(each, 2, 1).astype(pages[0].dtype), ((0, 0), (0, 0), (0, padding), (0, 0))) for each in new
    ]

    def page(b, touched, table, start):
        # A page that holds no new token is not visited: the last one is visited again, with the same result.
        last = (start[b] + tokens - 1) // page_size
        return table[b, jnp.minimum(start[b] // page_size + touched, last)], 0, 0, 0

    page_spec = pl.BlockSpec((None, kv_heads, page_size, head_dim), page)
    new_spec = pl.BlockSpec((None, kv_heads, tokens + padding, head_dim), lambda b, touched, *_: (b, 0, 0, 0))
    k_pages, v_pages = pl.pallas_call(
        functools.partial(_write, tokens=tokens, page_size=page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(tokens - 1, page_size) + 1),
            in_specs=[new_spec, new_spec, page_spec, page_spec],
            out_specs=[page_spec, page_spec],
        ),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in pages],
        input_output_aliases={4: 0, 5: 1},  # counted with the two scalars
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpreter(interpret),
        name="write_pages",
    )(page_table, start, *by_head, *pages)
    return k_pages, v_pages


def _write(
    page_table_ref, start_ref, new_k_ref, new_v_ref, old_k_ref, old_v_ref, k_ref, v_ref, *, tokens: int, page_size: int
):
    del page_table_ref
    start = start_ref[pl.program_id(0)]
    last = (start + tokens - 1) // page_size
    first_slot = jnp.minimum(start // page_size + pl.program_id(1), last) * page_size
    padded = new_k_ref.shape[1]
    token = first_slot - start + jax.lax.broadcasted_iota(jnp.int32, (page_size, padded), 0)
    is_source = token == jax.lax.broadcasted_iota(jnp.int32, (page_size, padded), 1)
    row = first_slot - start + jax.lax.broadcasted_iota(jnp.int32, (page_size, 1), 0)
    is_new = (row >= 0) & (row < tokens)
    for new_ref, old_ref, ref in ((new_k_ref, old_k_ref, k_ref), (new_v_ref, old_v_ref, v_ref)):
        for head in range(new_ref.shape[0]):
            # A row of one 1 times the new tokens moves a token without a dynamic index; exact at full precision.
            exact = jax.lax.Precision.HIGHEST if ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
            moved = jax.lax.dot_general(
                is_source.astype(ref.dtype),
                new_ref[head],
                (((1,), (0,)), ((), ())),
                precision=exact,
                preferred_element_type=jnp.float32,
            )
            ref[head] = jnp.where(is_new, moved.astype(ref.dtype), old_ref[head])
