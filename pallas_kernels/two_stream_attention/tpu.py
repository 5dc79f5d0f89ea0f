"""Two-stream attention through Pallas' Mosaic backend for TPUs: forward, gradients of queries, of keys and values.

The loops of the Triton body are the last axis of a grid here. Its length is data, the most tiles that any program has
to visit; what a program visits is prefetched as scalars, so that a program with less to do holds the index of
its last tile, which costs no copy, and skips the arithmetic. Every step brings the clean and the noisy tile of the
same row numbers; the noisy index rests outside the band of blocks. Running statistics and sums lie in VMEM scratch.

- `mix` and `query_grads`: grid (B, N, L / rows, steps).
- `clean_key_grads` and `noisy_key_grads`: grid (B, K, L / keys, G, steps); scores are computed transposed.

VMEM per program at the default tiles, H = 128, bfloat16: about 1 MiB for each [512, 512] float32 intermediate of which
the backward pass holds four, 2 MiB of scratch, and 128 KiB for each tile of a stream, double-buffered.

Operands are [B, heads, L, H] here (the last two axes of a block are whole tiles of the hardware), row statistics
[B, N, 1, L]. Supports H of 16, 32, 64 and 128, bfloat16 and float32, L a multiple of every tile, tiles that are
multiples of 128 on hardware.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu_interpreter import interpreter
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
    bounds = ranges_of_row_tiles(intervals, rows=tiles.rows, keys=tiles.keys)
    specs = _RowSpecs(bounds, heads // clean.k.shape[2], head_dim, tiles)

    def of_queries(value: Any) -> tuple[Any, Any]:
        return None if noisy_q is None else value, None if clean_q is None else value

    out = jax.ShapeDtypeStruct((batch, heads, length, head_dim), clean.v.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    column = pltpu.VMEM((tiles.rows, 1), jnp.float32)
    scratch = [pltpu.VMEM((tiles.rows, head_dim), jnp.float32), column, column]

    mixed = pl.pallas_call(
        functools.partial(_mix_kernel, tiles=tiles, scale=maths.base2_scale(head_dim), num_row_tiles=bounds.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, bounds.shape[1], _num_steps(bounds)),
            in_specs=[
                specs.interval,
                specs.interval,
                noisy and Stream(specs.row_tile, specs.noisy_keys, specs.noisy_keys),
                Stream(None if clean_q is None else specs.row_tile, specs.clean_keys, specs.clean_keys),
            ],
            out_specs=of_queries(Mixed(specs.row_tile, specs.statistics)),
            scratch_shapes=[_interval_scratch(tiles), *of_queries(scratch)],
        ),
        out_shape=of_queries(Mixed(out, lse)),
        compiler_params=_compiler_params(3, 1),
        interpret=interpreter(interpret),
        name="two_stream_mix",
    )(bounds.reshape(-1), *_interval_rows(intervals), *jax.tree.map(_heads_first, (noisy, clean)))
    noisy_mixed, clean_mixed = (each and Mixed(_heads_first(each.out), each.lse[:, :, 0]) for each in mixed)
    return noisy_mixed, clean_mixed


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
    bounds = ranges_of_row_tiles(intervals, rows=tiles.rows, keys=tiles.keys)
    specs = _RowSpecs(bounds, heads // clean.k.shape[2], head_dim, tiles)
    shape = jax.ShapeDtypeStruct((batch, heads, length, head_dim), queries[0].dtype)
    bar_specs = Cotangent(specs.row_tile, specs.statistics, specs.statistics)
    column = pltpu.VMEM((tiles.rows, 1), jnp.float32)
    # The sum, and the row statistics turned into columns.
    scratch = Cotangent(pltpu.VMEM((tiles.rows, head_dim), jnp.float32), column, column)
    q_bars = pl.pallas_call(
        functools.partial(
            _query_grads_kernel, tiles=tiles, scale=maths.base2_scale(head_dim), num_row_tiles=bounds.shape[1]
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, bounds.shape[1], _num_steps(bounds)),
            in_specs=[
                specs.interval,
                specs.interval,
                noisy and Stream(specs.row_tile, specs.noisy_keys, specs.noisy_keys),
                Stream(None if clean.q is None else specs.row_tile, specs.clean_keys, specs.clean_keys),
                noisy_bar and bar_specs,
                clean_bar and bar_specs,
            ],
            out_specs=(noisy_bar and specs.row_tile, clean_bar and specs.row_tile),
            scratch_shapes=[_interval_scratch(tiles), noisy_bar and scratch, clean_bar and scratch],
        ),
        out_shape=(noisy_bar and shape, clean_bar and shape),
        compiler_params=_compiler_params(3, 1),
        interpret=interpreter(interpret),
        name="two_stream_query_grads",
    )(
        bounds.reshape(-1),
        *_interval_rows(intervals),
        *jax.tree.map(_heads_first, (noisy, clean)),
        *(bar and _cotangent_rows(bar) for bar in (noisy_bar, clean_bar)),
    )
    return jax.tree.map(_heads_first, q_bars)


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
    of_queries = [(_heads_first(q), _cotangent_rows(bar)) for q, bar in queries.values()]
    group = of_queries[0][0].shape[1] // kv_heads
    bounds = ranges_of_key_tiles(intervals, rows=tiles.rows, keys=tiles.keys)
    num_key_tiles = bounds.shape[1]
    if Sight.NOISY_TO_NOISY in queries:
        # Only the band is walked: its end takes the place of the end.
        bounds = bounds.at[:, :, TileRange._fields.index("upper")].set(bounds[:, :, -1])

    def row_tile_of(b: Any, t: Any, step: Any, bounds: Any) -> Any:
        span = _tile_range(bounds, b * num_key_tiles + t)
        return _clamp(span.lower + step, span.lower, span.upper)

    of_rows = pl.BlockSpec(
        (None, None, tiles.rows, head_dim),
        lambda b, k, t, g, step, bounds: (b, k * group + g, row_tile_of(b, t, step, bounds), 0),
    )
    statistics = pl.BlockSpec(
        (None, None, 1, tiles.rows),
        lambda b, k, t, g, step, bounds: (b, k * group + g, 0, row_tile_of(b, t, step, bounds)),
    )
    interval = pl.BlockSpec(
        (None, 1, tiles.rows), lambda b, k, t, g, step, bounds: (b, 0, row_tile_of(b, t, step, bounds))
    )
    key_tile = pl.BlockSpec((None, None, tiles.keys, head_dim), lambda b, k, t, g, step, bounds: (b, k, t, 0))
    shape = jax.ShapeDtypeStruct((batch, kv_heads, length, head_dim), stream.k.dtype)
    sums = pltpu.VMEM((tiles.keys, head_dim), jnp.float32)
    k_bar, v_bar = pl.pallas_call(
        functools.partial(
            _key_grads_kernel,
            sights=tuple(queries),
            tiles=tiles,
            scale=maths.base2_scale(head_dim),
            num_key_tiles=num_key_tiles,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, num_key_tiles, group, _num_steps(bounds)),
            in_specs=[
                interval,
                interval,
                [(of_rows, Cotangent(of_rows, statistics, statistics)) for _ in queries],
                key_tile,
                key_tile,
            ],
            out_specs=(key_tile, key_tile),
            scratch_shapes=[sums, sums],
        ),
        out_shape=(shape, shape),
        compiler_params=_compiler_params(3, 2),
        interpret=interpreter(interpret),
        name=name,
    )(
        bounds.reshape(-1),
        *_interval_rows(intervals),
        of_queries,
        _heads_first(stream.k),
        _heads_first(stream.v),
    )
    return _heads_first(k_bar), _heads_first(v_bar)


def _mix_kernel(
    bounds: Any,
    document_first: Any,
    block_first: Any,
    noisy: Stream | None,
    clean: Stream,
    noisy_out: Any,
    clean_out: Any,
    columns: Any,
    noisy_seen: Any,
    clean_seen: Any,
    *,
    tiles: PassTiles,
    scale: float,
    num_row_tiles: int,
) -> None:
    tile, step, num_steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    span = _tile_range(bounds, pl.program_id(0) * num_row_tiles + tile)
    number = span.lower + step
    streams = [(noisy, noisy_seen, noisy_out, Sight.NOISY_TO_CLEAN)] if noisy else []
    if clean_out:
        streams.append((clean, clean_seen, clean_out, Sight.CLEAN_TO_CLEAN))

    @pl.when(step == 0)
    def _() -> None:
        _store_columns(columns, document_first, block_first)
        for _, seen, _, _ in streams:
            for ref, value in zip(seen, maths.no_mixture(*seen[0].shape), strict=True):
                ref[...] = value

    def add(stream: Any, seen: Any, keys: Any, sight: Sight | None) -> None:
        visible = sight and _visible(sight, columns, tile, number, tiles)
        current = maths.Mixture(*(ref[...] for ref in seen))
        updated = maths.mix_tile(current, stream.q[...], keys.k[...], keys.v[...], visible, scale)
        for ref, value in zip(seen, updated, strict=True):
            ref[...] = value

    @pl.when(_is_whole(number, span))
    def _() -> None:
        for stream, seen, _, _ in streams:
            add(stream, seen, clean, None)

    @pl.when(_is_partial(number, span))
    def _() -> None:
        for stream, seen, _, sight in streams:
            add(stream, seen, clean, sight)

    if noisy:

        @pl.when(_is_in_band(number, span))
        def _() -> None:
            add(noisy, noisy_seen, noisy, Sight.NOISY_TO_NOISY)

    @pl.when(step == num_steps - 1)
    def _() -> None:
        for _, seen, output, _ in streams:
            out, lse = maths.finish(maths.Mixture(*(ref[...] for ref in seen)))
            output.out[...] = out.astype(output.out.dtype)
            output.lse[...] = _as_row(lse)


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
    columns: Any,
    noisy_sums: Any,
    clean_sums: Any,
    *,
    tiles: PassTiles,
    scale: float,
    num_row_tiles: int,
) -> None:
    tile, step, num_steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    span = _tile_range(bounds, pl.program_id(0) * num_row_tiles + tile)
    number = span.lower + step
    streams = []
    if noisy and noisy_bar:
        streams.append((noisy, noisy_bar, noisy_sums, noisy_out, Sight.NOISY_TO_CLEAN))
    if clean_bar:
        streams.append((clean, clean_bar, clean_sums, clean_out, Sight.CLEAN_TO_CLEAN))

    @pl.when(step == 0)
    def _() -> None:
        _store_columns(columns, document_first, block_first)
        for _, bar, sums, _, _ in streams:
            sums.out_bar[...] = jnp.zeros(sums.out_bar.shape, jnp.float32)
            sums.lse[...] = _as_column(bar.lse[...])
            sums.delta[...] = _as_column(bar.delta[...])

    def add(stream: Any, bar: Any, sums: Any, keys: Any, sight: Sight | None) -> None:
        visible = sight and _visible(sight, columns, tile, number, tiles)
        k = keys.k[...]
        _, scores_bar = maths.differentiate_tile(
            (stream.q[...], k), (bar.out_bar[...], keys.v[...]), sums.lse[...], sums.delta[...], visible, scale
        )
        sums.out_bar[...] += maths.dot(scores_bar.astype(k.dtype), k)

    @pl.when(_is_whole(number, span))
    def _() -> None:
        for stream, bar, sums, _, _ in streams:
            add(stream, bar, sums, clean, None)

    @pl.when(_is_partial(number, span))
    def _() -> None:
        for stream, bar, sums, _, sight in streams:
            add(stream, bar, sums, clean, sight)

    if noisy:

        @pl.when(_is_in_band(number, span))
        def _() -> None:
            add(noisy, noisy_bar, noisy_sums, noisy, Sight.NOISY_TO_NOISY)

    @pl.when(step == num_steps - 1)
    def _() -> None:
        for _, _, sums, out, _ in streams:
            out[...] = (sums.out_bar[...] * sums.out_bar.shape[1] ** -0.5).astype(out.dtype)


def _key_grads_kernel(
    bounds: Any,
    document_first: Any,
    block_first: Any,
    queries: list[tuple[Any, Cotangent]],
    k: Any,
    v: Any,
    k_out: Any,
    v_out: Any,
    k_bar: Any,
    v_bar: Any,
    *,
    sights: tuple[Sight, ...],
    tiles: PassTiles,
    scale: float,
    num_key_tiles: int,
) -> None:
    tile = pl.program_id(2)
    span = _tile_range(bounds, pl.program_id(0) * num_key_tiles + tile)
    head, step = pl.program_id(3), pl.program_id(4)
    is_last = (head == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1)
    number = span.lower + step

    @pl.when((head == 0) & (step == 0))
    def _() -> None:
        k_bar[...] = jnp.zeros(k_bar.shape, jnp.float32)
        v_bar[...] = jnp.zeros(v_bar.shape, jnp.float32)

    def add(*, is_masked: bool) -> None:
        column = _tile_iota(tile, tiles.keys, 0)
        row = _tile_iota(number, tiles.rows, 1)
        for sight, (q_ref, bar) in zip(sights, queries, strict=True):
            interval = sight.interval(document_first[...], block_first[...], row)
            visible = maths.is_within(column, interval) if is_masked else None
            q, out_bar = q_ref[...], bar.out_bar[...]
            weights, scores_bar = maths.differentiate_tile(
                (k[...], q), (v[...], out_bar), bar.lse[...], bar.delta[...], visible, scale
            )
            k_bar[...] += maths.dot(scores_bar.astype(q.dtype), q)
            v_bar[...] += maths.dot(weights.astype(out_bar.dtype), out_bar)

    pl.when(_is_partial(number, span))(functools.partial(add, is_masked=True))
    if Sight.NOISY_TO_NOISY not in sights:
        pl.when(_is_whole(number, span))(functools.partial(add, is_masked=False))

    @pl.when(is_last)
    def _() -> None:
        k_out[...] = (k_bar[...] * k_bar.shape[1] ** -0.5).astype(k_out.dtype)
        v_out[...] = v_bar[...].astype(v_out.dtype)


class _RowSpecs:
    """Specs of the two kernels whose programs hold queries; `bounds` is prefetched flat."""

    def __init__(self, bounds: Int[Array, "B tiles bounds"], group: int, head_dim: int, tiles: PassTiles):
        num_row_tiles = bounds.shape[1]

        def clean_keys(b: Any, n: Any, t: Any, step: Any, bounds: Any) -> Any:
            span = _tile_range(bounds, b * num_row_tiles + t)
            return b, n // group, _clamp(span.lower + step, span.lower, span.upper), 0

        def noisy_keys(b: Any, n: Any, t: Any, step: Any, bounds: Any) -> Any:
            span = _tile_range(bounds, b * num_row_tiles + t)
            return b, n // group, _clamp(span.lower + step, span.band_lower, span.band_upper), 0

        keys = (None, None, tiles.keys, head_dim)
        self.clean_keys = pl.BlockSpec(keys, clean_keys)
        self.noisy_keys = pl.BlockSpec(keys, noisy_keys)
        self.row_tile = pl.BlockSpec((None, None, tiles.rows, head_dim), lambda b, n, t, step, bounds: (b, n, t, 0))
        self.statistics = pl.BlockSpec((None, None, 1, tiles.rows), lambda b, n, t, step, bounds: (b, n, 0, t))
        self.interval = pl.BlockSpec((None, 1, tiles.rows), lambda b, n, t, step, bounds: (b, 0, t))


def _num_steps(bounds: Int[Array, "B tiles bounds"]) -> Int[Array, ""]:
    """The most tiles that any program visits; one where there are none, since outputs must be written."""
    span = TileRange(*(bounds[:, :, index] for index in range(NUM_BOUNDS)))
    return jnp.maximum(jnp.max(span.upper - span.lower), 1)


def _tile_range(bounds: Any, tile: Any) -> TileRange:
    return TileRange(*(bounds[tile * NUM_BOUNDS + index] for index in range(NUM_BOUNDS)))


def _clamp(number: Any, lower: Any, upper: Any) -> Any:
    """The nearest tile in [lower, upper); tile 0 where a range is empty at the end of the array."""
    return jnp.maximum(jnp.minimum(jnp.maximum(number, lower), upper - 1), 0)


def _is_whole(number: Any, span: TileRange) -> Any:
    return (span.full_lower <= number) & (number < span.full_upper)


def _is_partial(number: Any, span: TileRange) -> Any:
    return (number < span.upper) & ((number < span.full_lower) | (span.full_upper <= number))


def _is_in_band(number: Any, span: TileRange) -> Any:
    return (span.band_lower <= number) & (number < span.band_upper)


def _store_columns(columns: Any, document_first: Any, block_first: Any) -> None:
    for column, row in zip(columns, (document_first, block_first), strict=True):
        column[...] = _as_column(row[...])


def _visible(sight: Sight, columns: Any, tile: Any, number: Any, tiles: PassTiles) -> Array:
    document_first, block_first = (column[...] for column in columns)
    interval = sight.interval(document_first, block_first, _tile_iota(tile, tiles.rows, 0))
    return maths.is_within(_tile_iota(number, tiles.keys, 1), interval)


def _tile_iota(tile: Any, size: int, axis: int) -> Array:
    """Numbers of the rows of a tile: a column for axis 0, a row for axis 1."""
    shape = (size, 1) if axis == 0 else (1, size)
    return tile * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _as_column(row: Array) -> Array:
    return row.reshape(row.shape[1], 1)


def _as_row(column: Array) -> Array:
    return column.reshape(1, column.shape[0])


def _heads_first(array: Array) -> Array:
    """[B, L, N, H] <-> [B, N, L, H]."""
    return array.swapaxes(1, 2)


def _cotangent_rows(bar: Cotangent) -> Cotangent:
    return Cotangent(_heads_first(bar.out_bar), bar.lse[:, :, None], bar.delta[:, :, None])


def _interval_rows(intervals: Intervals) -> tuple[Array, Array]:
    return intervals.document_first[:, None], intervals.block_first[:, None]


def _interval_scratch(tiles: PassTiles) -> list[Any]:
    return [pltpu.VMEM((tiles.rows, 1), jnp.int32)] * 2


def _compiler_params(num_parallel: int, num_sequential: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * num_parallel + ("arbitrary",) * num_sequential)
