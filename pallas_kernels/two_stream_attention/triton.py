"""Two-stream attention through Pallas' Triton backend: forward, gradients of queries, gradients of keys and values.

Every program owns what it writes and loops in a fixed order, so two runs agree bit for bit. One iteration loads one
tile of the other axis; tiles that no row of the program sees are not visited, and only tiles that some row sees in
part are masked.

- `mix` and `query_grads`: grid (N, B, L / rows), the last rows, which have most to do, first. A program holds the
  noisy and the clean queries of the same rows and shares each clean K/V tile between them; noisy K/V tiles are
  visited only on the band of blocks around the diagonal.
- `clean_key_grads` and `noisy_key_grads`: grid (K, B, L / keys). A program holds K, V and the float32 dK, dV of one
  key head and loops over its G query heads and their tiles of rows; scores are computed transposed.

On-chip per program at the default tiles, H = 128, bfloat16. Shared memory: queries of two streams 64 KiB, in the
backward pass their cotangents 64 KiB more, and two K/V tiles in flight 64 KiB. Registers: sums of two streams 128 KiB
of the 256 KiB of an SM.

Supports H of 16, 32, 64 and 128, bfloat16 and float32, L a multiple of every tile (the caller pads: this backend does
not mask ragged tiles before jax 0.12), fewer than 2^31 elements per array.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels.two_stream_attention import maths
from pallas_kernels.two_stream_attention.intervals import (
    NUM_BOUNDS,
    Intervals,
    Sight,
    TileRange,
    ranges_of_key_tiles,
    ranges_of_row_tiles,
)
from pallas_kernels.two_stream_attention.streams import Cotangent, Mixed, Stream
from pallas_kernels.two_stream_attention.tiles import PassTiles


def mix(
    noisy: Stream | None, clean: Stream, intervals: Intervals, tiles: PassTiles, interpret: bool
) -> tuple[Mixed | None, Mixed | None]:
    """Outputs and statistics of the streams that have queries."""
    noisy_q, clean_q = noisy and noisy.q, clean.q
    some_q: Any = noisy_q if clean_q is None else clean_q
    batch, length, heads, head_dim = some_q.shape
    group = heads // clean.k.shape[2]
    row_tile, row_statistics, whole = _row_specs(length, head_dim, tiles.rows, group)

    def stream_specs(stream: Stream | None) -> Stream | None:
        return stream and Stream(None if stream.q is None else row_tile, whole, whole)

    def out_shape(q: Any) -> Mixed | None:
        lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
        return None if q is None else Mixed(jax.ShapeDtypeStruct(q.shape, clean.v.dtype), lse)

    return pl.pallas_call(
        functools.partial(_mix_kernel, tiles=tiles, scale=maths.base2_scale(head_dim)),
        grid=(heads, batch, length // tiles.rows),
        in_specs=[*_interval_specs(length, tiles.rows), stream_specs(noisy), stream_specs(clean)],
        out_specs=tuple(None if q is None else Mixed(row_tile, row_statistics) for q in (noisy_q, clean_q)),
        out_shape=(out_shape(noisy_q), out_shape(clean_q)),
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
        name="two_stream_mix",
    )(
        ranges_of_row_tiles(intervals, rows=tiles.rows, keys=tiles.keys),
        intervals.document_first,
        intervals.block_first,
        noisy,
        clean,
    )


def query_grads(
    noisy: Stream | None,
    clean: Stream,
    noisy_bar: Cotangent | None,
    clean_bar: Cotangent | None,
    intervals: Intervals,
    tiles: PassTiles,
    interpret: bool,
) -> tuple[Float[Array, "B L N H"] | None, Float[Array, "B L N H"] | None]:
    """Gradients of queries, of the streams that have a cotangent; a clean stream without one may lack queries."""
    queries = [stream.q for stream, bar in ((noisy, noisy_bar), (clean, clean_bar)) if stream and bar]
    batch, length, heads, head_dim = queries[0].shape
    group = heads // clean.k.shape[2]
    row_tile, row_statistics, whole = _row_specs(length, head_dim, tiles.rows, group)

    def stream_specs(stream: Stream | None) -> Stream | None:
        return stream and Stream(None if stream.q is None else row_tile, whole, whole)

    def bar_specs(bar: Cotangent | None) -> Cotangent | None:
        return bar and Cotangent(row_tile, row_statistics, row_statistics)

    shape = jax.ShapeDtypeStruct(queries[0].shape, queries[0].dtype)
    return pl.pallas_call(
        functools.partial(_query_grads_kernel, tiles=tiles, scale=maths.base2_scale(head_dim)),
        grid=(heads, batch, length // tiles.rows),
        in_specs=[
            *_interval_specs(length, tiles.rows),
            stream_specs(noisy),
            stream_specs(clean),
            bar_specs(noisy_bar),
            bar_specs(clean_bar),
        ],
        out_specs=(noisy_bar and row_tile, clean_bar and row_tile),
        out_shape=(noisy_bar and shape, clean_bar and shape),
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
        name="two_stream_query_grads",
    )(
        ranges_of_row_tiles(intervals, rows=tiles.rows, keys=tiles.keys),
        intervals.document_first,
        intervals.block_first,
        noisy,
        clean,
        noisy_bar,
        clean_bar,
    )


def clean_key_grads(
    noisy_q: Float[Array, "B L N H"] | None,
    clean: Stream,
    noisy_bar: Cotangent | None,
    clean_bar: Cotangent,
    intervals: Intervals,
    tiles: PassTiles,
    interpret: bool,
) -> tuple[Float[Array, "B L K H"], Float[Array, "B L K H"]]:
    """Gradients of keys and values of the clean stream, from the queries of both."""
    queries = {Sight.CLEAN_TO_CLEAN: (clean.q, clean_bar)}
    if noisy_bar:
        queries[Sight.NOISY_TO_CLEAN] = (noisy_q, noisy_bar)
    return _key_grads(queries, clean, intervals, tiles, interpret, "two_stream_clean_key_grads")


def noisy_key_grads(
    noisy: Stream, noisy_bar: Cotangent, intervals: Intervals, tiles: PassTiles, interpret: bool
) -> tuple[Float[Array, "B L K H"], Float[Array, "B L K H"]]:
    """Gradients of keys and values of the noisy stream, from the noisy queries of the same block."""
    queries = {Sight.NOISY_TO_NOISY: (noisy.q, noisy_bar)}
    return _key_grads(queries, noisy, intervals, tiles, interpret, "two_stream_noisy_key_grads")


def _key_grads(
    queries: dict[Sight, tuple[Any, Cotangent]],
    stream: Stream,
    intervals: Intervals,
    tiles: PassTiles,
    interpret: bool,
    name: str,
) -> tuple[Float[Array, "B L K H"], Float[Array, "B L K H"]]:
    batch, length, kv_heads, head_dim = stream.k.shape
    of_queries = list(queries.values())
    group = of_queries[0][0].shape[2] // kv_heads
    key_tile = pl.BlockSpec((None, tiles.keys, None, head_dim), lambda k, b, t: (b, t, k, 0))
    of_group = pl.BlockSpec((None, length, group, head_dim), lambda k, b, t: (b, 0, k, 0))
    statistics = pl.BlockSpec((None, group, length), lambda k, b, t: (b, k, 0))
    of_rows = pl.BlockSpec((None, length), lambda k, b, t: (b, 0))
    shape = jax.ShapeDtypeStruct(stream.k.shape, stream.k.dtype)
    return pl.pallas_call(
        functools.partial(
            _key_grads_kernel, sights=tuple(queries), group=group, tiles=tiles, scale=maths.base2_scale(head_dim)
        ),
        grid=(kv_heads, batch, length // tiles.keys),
        in_specs=[
            pl.BlockSpec((None, None, NUM_BOUNDS), lambda k, b, t: (b, t, 0)),
            of_rows,
            of_rows,
            [(of_group, Cotangent(of_group, statistics, statistics)) for _ in queries],
            key_tile,
            key_tile,
        ],
        out_specs=(key_tile, key_tile),
        out_shape=(shape, shape),
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
        name=name,
    )(
        ranges_of_key_tiles(intervals, rows=tiles.rows, keys=tiles.keys),
        intervals.document_first,
        intervals.block_first,
        of_queries,
        stream.k,
        stream.v,
    )


def _mix_kernel(
    bounds: Any,
    document_first: Any,
    block_first: Any,
    noisy: Stream | None,
    clean: Stream,
    noisy_out: Mixed | None,
    clean_out: Mixed | None,
    *,
    tiles: PassTiles,
    scale: float,
) -> None:
    span = _tile_range(bounds)
    sees = _sights(document_first, block_first, tiles)
    queries = [(noisy.q[...], sees[Sight.NOISY_TO_CLEAN])] if noisy else []
    if clean_out:
        queries.append((clean.q[...], sees[Sight.CLEAN_TO_CLEAN]))

    def clean_tile(number: Any, seen: list[maths.Mixture], *, is_masked: bool) -> list[maths.Mixture]:
        k, v, column = _load_keys(clean, number, tiles)
        return [
            maths.mix_tile(each, q, k, v, maths.is_within(column, interval) if is_masked else None, scale)
            for each, (q, interval) in zip(seen, queries, strict=True)
        ]

    def noisy_tile(number: Any, seen: maths.Mixture) -> maths.Mixture:
        k, v, column = _load_keys(noisy, number, tiles)
        visible = maths.is_within(column, sees[Sight.NOISY_TO_NOISY])
        return maths.mix_tile(seen, queries[0][0], k, v, visible, scale)

    seen = _visit(span, clean_tile, [maths.no_mixture(*q.shape) for q, _ in queries])
    if noisy:
        seen[0] = jax.lax.fori_loop(span.band_lower, span.band_upper, noisy_tile, seen[0])
    outputs = [output for output in (noisy_out, clean_out) if output]
    for output, each in zip(outputs, seen, strict=True):
        out, lse = maths.finish(each)
        output.out[...] = out.astype(output.out.dtype)
        output.lse[...] = jnp.squeeze(lse, 1)


def _query_grads_kernel(
    bounds: Any,
    document_first: Any,
    block_first: Any,
    noisy: Stream | None,
    clean: Stream,
    noisy_bar: Cotangent | None,
    clean_bar: Cotangent | None,
    noisy_out: Any,
    clean_out: Any,
    *,
    tiles: PassTiles,
    scale: float,
) -> None:
    span = _tile_range(bounds)
    sees = _sights(document_first, block_first, tiles)
    queries = []
    if noisy and noisy_bar:
        queries.append((noisy.q[...], _load_cotangent(noisy_bar), sees[Sight.NOISY_TO_CLEAN], noisy_out))
    if clean_bar:
        queries.append((clean.q[...], _load_cotangent(clean_bar), sees[Sight.CLEAN_TO_CLEAN], clean_out))

    def add(q_bar: Array, q: Array, bar: Cotangent, k: Array, v: Array, visible: Array | None) -> Array:
        _, scores_bar = maths.differentiate_tile((q, k), (bar.out_bar, v), bar.lse, bar.delta, visible, scale)
        return q_bar + maths.dot(scores_bar.astype(k.dtype), k)

    def clean_tile(number: Any, q_bars: list[Array], *, is_masked: bool) -> list[Array]:
        k, v, column = _load_keys(clean, number, tiles)
        return [
            add(q_bar, q, bar, k, v, maths.is_within(column, interval) if is_masked else None)
            for q_bar, (q, bar, interval, _) in zip(q_bars, queries, strict=True)
        ]

    def noisy_tile(number: Any, q_bar: Array) -> Array:
        k, v, column = _load_keys(noisy, number, tiles)
        q, bar, _, _ = queries[0]
        return add(q_bar, q, bar, k, v, maths.is_within(column, sees[Sight.NOISY_TO_NOISY]))

    q_bars = _visit(span, clean_tile, [jnp.zeros(q.shape, jnp.float32) for q, *_ in queries])
    if noisy:
        q_bars[0] = jax.lax.fori_loop(span.band_lower, span.band_upper, noisy_tile, q_bars[0])
    for q_bar, (q, _, _, out) in zip(q_bars, queries, strict=True):
        out[...] = (q_bar * q.shape[1] ** -0.5).astype(out.dtype)


def _key_grads_kernel(
    bounds: Any,
    document_first: Any,
    block_first: Any,
    queries: list[tuple[Any, Cotangent]],
    k_ref: Any,
    v_ref: Any,
    k_out: Any,
    v_out: Any,
    *,
    sights: tuple[Sight, ...],
    group: int,
    tiles: PassTiles,
    scale: float,
) -> None:
    span = _tile_range(bounds)
    k, v = k_ref[...], v_ref[...]
    column = _tile_iota(pl.program_id(2), tiles.keys, 0)

    def row_tile(
        number: Any, bars: tuple[Array, Array], *, is_masked: bool, sight: Sight, q: Any, bar: Cotangent, head: Any
    ) -> tuple[Array, Array]:
        rows = pl.ds(number * tiles.rows, tiles.rows)
        visible = None
        if is_masked:
            row = _tile_iota(number, tiles.rows, 1)
            interval = sight.interval(document_first[rows][None, :], block_first[rows][None, :], row)
            visible = maths.is_within(column, interval)
        q, out_bar = q[rows, head, :], bar.out_bar[rows, head, :]
        lse, delta = bar.lse[head, rows][None, :], bar.delta[head, rows][None, :]
        weights, scores_bar = maths.differentiate_tile((k, q), (v, out_bar), lse, delta, visible, scale)
        k_bar, v_bar = bars
        return (
            k_bar + maths.dot(scores_bar.astype(q.dtype), q),
            v_bar + maths.dot(weights.astype(out_bar.dtype), out_bar),
        )

    def of_head(head: Any, bars: tuple[Array, Array]) -> tuple[Array, Array]:
        for sight, (q, bar) in zip(sights, queries, strict=True):
            visit_tile = functools.partial(row_tile, sight=sight, q=q, bar=bar, head=head)
            if sight is Sight.NOISY_TO_NOISY:
                visit_tile = functools.partial(visit_tile, is_masked=True)
                bars = jax.lax.fori_loop(span.band_lower, span.band_upper, visit_tile, bars)
            else:
                bars = _visit(span, visit_tile, bars)
        return bars

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    k_bar, v_bar = jax.lax.fori_loop(0, group, of_head, zeros)
    k_out[...] = (k_bar * k.shape[1] ** -0.5).astype(k_out.dtype)
    v_out[...] = v_bar.astype(v_out.dtype)


def _visit(span: TileRange, visit_tile: Callable[..., Any], carry: Any) -> Any:
    """Visits the tiles seen in part, on either side of the whole ones, and then the whole ones."""
    num_before = span.full_lower - span.lower

    def partial_tile(step: Any, carry: Any) -> Any:
        number = jnp.where(step < num_before, span.lower + step, span.full_upper + step - num_before)
        return visit_tile(number, carry, is_masked=True)

    carry = jax.lax.fori_loop(0, num_before + span.upper - span.full_upper, partial_tile, carry)
    whole_tile = functools.partial(visit_tile, is_masked=False)
    return jax.lax.fori_loop(span.full_lower, span.full_upper, whole_tile, carry)


def _tile_range(bounds: Any) -> TileRange:
    return TileRange(*(bounds[index] for index in range(NUM_BOUNDS)))


def _sights(document_first: Any, block_first: Any, tiles: PassTiles) -> dict[Sight, tuple[Array, Array]]:
    """What the rows of this program see; tiles of rows run from the last to the first."""
    row = _tile_iota(pl.num_programs(2) - 1 - pl.program_id(2), tiles.rows, 0)
    return {sight: sight.interval(document_first[...][:, None], block_first[...][:, None], row) for sight in Sight}


def _tile_iota(tile: Any, size: int, axis: int) -> Array:
    """Numbers of the rows of a tile: a column for axis 0, a row for axis 1."""
    shape = (size, 1) if axis == 0 else (1, size)
    return tile * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _load_keys(stream: Any, number: Any, tiles: PassTiles) -> tuple[Array, Array, Array]:
    keys = pl.ds(number * tiles.keys, tiles.keys)
    return stream.k[keys, :], stream.v[keys, :], _tile_iota(number, tiles.keys, 1)


def _load_cotangent(bar: Cotangent) -> Cotangent:
    return Cotangent(bar.out_bar[...], bar.lse[...][:, None], bar.delta[...][:, None])


def _interval_specs(length: int, rows: int) -> list[pl.BlockSpec]:
    last = length // rows - 1
    of_tile = pl.BlockSpec((None, rows), lambda n, b, t: (b, last - t))
    return [pl.BlockSpec((None, None, NUM_BOUNDS), lambda n, b, t: (b, last - t, 0)), of_tile, of_tile]


def _row_specs(length: int, head_dim: int, rows: int, group: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Specs of a tile of queries, of its row statistics, and of all keys of the head that it reads."""
    last = length // rows - 1
    return (
        pl.BlockSpec((None, rows, None, head_dim), lambda n, b, t: (b, last - t, n, 0)),
        pl.BlockSpec((None, None, rows), lambda n, b, t: (b, n, last - t)),
        pl.BlockSpec((None, length, None, head_dim), lambda n, b, t: (b, 0, n // group, 0)),
    )


def _compiler_params(tiles: PassTiles) -> pltriton.CompilerParams:
    return pltriton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
