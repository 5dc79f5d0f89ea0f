"""Row statistics and draws through Pallas' Triton backend (NVIDIA sm_80 and newer), bound by the bytes of the logits.

Grid (rows, tiles of the vocabulary) throughout. A program loads one tile of one row, 4 * vocab bytes over the registers
of its warps and no shared memory but for reductions, and writes a few scalars; nothing loops. The scalars of a row's
tiles are joined in ascending order, element by element, outside: the order of summation is fixed by V and
`tiles.vocab`, no atomics, so a row's bits are the same alone and in any batch. Splitting a row matters at small
batches: one multiprocessor would hash 151,936 counters for some 100 us.

Passes over a row: one without filters. With filters 1 + 2 * 8 (float32) or 1 + 2 * 4 (bfloat16), each a launch of its
own; 15 thresholds a pass, and about 30 operations an element, keep a pass near the memory's time. A draw reads the
chosen row of p, and that of q where a draft was refused, once; the row index is loaded by the program.

Any vocabulary: the last tile is masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import device_kind
from pallas_kernels.verify import maths, threefry
from pallas_kernels.verify.rows import Refused, RowStats
from pallas_kernels.verify.tiles import TritonTiles, triton_tiles


def row_stats(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    *,
    filtered: bool,
    excluded_id: int,
    tiles: TritonTiles | None,
    interpret: bool,
) -> RowStats:
    """The statistics as their contract states them; see the package for arguments and rules."""
    tiles = tiles or triton_tiles(device_kind())
    temperature = temperature[:, None]
    num_tiles = pl.cdiv(logits.shape[1], tiles.vocab)
    call = functools.partial(_call, tiles=tiles, interpret=interpret, excluded_id=excluded_id)
    parts = call(_top_kernel, (logits, temperature), [jnp.float32, jnp.int32, jnp.float32], (len(logits), num_tiles))
    top = functools.reduce(
        lambda left, right: maths.merge_tops(left, right, temperature),
        (maths.Top(*(part[:, tile : tile + 1] for part in parts)) for tile in range(num_tiles)),
    )
    stats = RowStats(top.id, top.logit, jnp.full_like(top.logit, -jnp.inf), top.mass)
    if filtered:

        def weight_above(thresholds: Array, floor: Array | None) -> Array:
            shape = (len(logits), num_tiles, maths.NUM_SLOTS)
            scalars = (temperature, top.logit, top.logit if floor is None else floor)
            kernel = functools.partial(_weight_kernel, is_count=floor is None)
            (weights,) = call(kernel, (logits, thresholds, *scalars), [jnp.float32], shape)
            return functools.reduce(jnp.add, (weights[:, tile] for tile in range(num_tiles)))

        stats = maths.filtered_stats(
            top,
            temperature,
            top_k[:, None],
            top_p[:, None],
            weight_above,
            num_digits=4 if logits.dtype == jnp.bfloat16 else 8,
            # Straight-line launches fit a CUDA graph, a loop does not; the interpreter only takes longer to compile.
            unroll=not interpret,
        )
    return jax.tree.map(lambda column: column[:, 0], stats)


def draw(
    logits: Float[Array, "B C V"],
    row: Int[Array, " B"],
    temperature: Float[Array, " B"],
    stats: RowStats,
    key: threefry.Key,
    refused: Refused | None,
    *,
    excluded_id: int,
    tiles: TritonTiles | None,
    interpret: bool,
) -> Int[Array, " B"]:
    """One id per request from max(0, p - q), or from p; arguments as in the reference."""
    tiles = tiles or triton_tiles(device_kind())
    columns = jax.tree.map(lambda values: values[:, None], (row, temperature, stats, key))
    if refused is not None:
        is_refused, token, q_row, q_stats = jax.tree.map(
            lambda values: values[:, None],
            (refused.is_refused.astype(jnp.int32), refused.token, refused.row, refused.stats),
        )
        refused = Refused(is_refused, token, refused.logits, q_row, q_stats)
    num_tiles = pl.cdiv(logits.shape[2], tiles.vocab)
    dtypes = [jnp.float32, jnp.int32] * (1 if refused is None else 2)
    inputs, shape = (logits, *columns, refused), (len(logits), num_tiles)
    parts = _call(_draw_kernel, inputs, dtypes, shape, tiles=tiles, interpret=interpret, excluded_id=excluded_id)
    bests = [
        functools.reduce(maths.merge_bests, (maths.Best(s[:, t : t + 1], i[:, t : t + 1]) for t in range(num_tiles)))
        for s, i in zip(parts[::2], parts[1::2], strict=True)
    ]
    return maths.winner(*bests, *[None] * (2 - len(bests)))[:, 0]


def _top_kernel(logits_ref, temperature_ref, logit_ref, id_ref, mass_ref, *, vocab: int, excluded_id: int) -> None:
    own, tile = _own(0), _own(1)
    x, ids = _load_tile(logits_ref, (own,), vocab, excluded_id)
    logit_ref[own, tile], id_ref[own, tile], mass_ref[own, tile] = maths.tile_top(x, ids, temperature_ref[own, :])


def _weight_kernel(
    logits_ref,
    thresholds_ref,
    temperature_ref,
    top_logit_ref,
    floor_ref,
    weights_ref,
    *,
    vocab: int,
    excluded_id: int,
    is_count: bool,
) -> None:
    own = _own(0)
    x, _ = _load_tile(logits_ref, (own,), vocab, excluded_id)
    thresholds = [thresholds_ref[own, pl.ds(slot, 1)] for slot in range(maths.NUM_SLOTS)]
    floor = None if is_count else floor_ref[own, :]
    weights = maths.tile_weight_above(x, top_logit_ref[own, :], temperature_ref[own, :], thresholds, floor)
    for slot, weight in enumerate(weights):
        weights_ref[own, pl.program_id(1), pl.ds(slot, 1)] = weight


def _draw_kernel(
    logits_ref, row_ref, temperature_ref, stats_refs, key_refs, refused, *out_refs, vocab: int, excluded_id: int
) -> None:
    request, own, tile = pl.program_id(0), _own(0), _own(1)
    temperature = temperature_ref[own, :]
    x, ids = _load_tile(logits_ref, (request, pl.ds(row_ref[request, 0], 1)), vocab, excluded_id)
    p = maths.probs(x, ids, temperature, _scalars(stats_refs, own))
    q = None
    if refused is not None:
        is_refused = refused.is_refused[own, :] != 0
        if refused.logits is None:
            q = maths.point_mass(ids, refused.token[own, :])
        else:
            q_row = (request, pl.ds(refused.row[request, 0], 1))
            y, _ = _load_tile(refused.logits, q_row, vocab, excluded_id, only_if=is_refused)
            q = maths.probs(y, ids, temperature, _scalars(refused.stats, own))
        q = jnp.where(is_refused, q, jnp.float32(0.0))
    best, plain = maths.tile_draw(p, q, ids, threefry.Key(*_scalars(key_refs, own)))
    out_refs[0][own, tile], out_refs[1][own, tile] = best
    if plain is not None:
        out_refs[2][own, tile], out_refs[3][own, tile] = plain


def _load_tile(ref, row, vocab: int, excluded_id: int, only_if: Array | None = None) -> tuple[Array, Array]:
    """This program's tile of the row at an index, and its ids; -inf where there is nothing to win."""
    first_id = pl.program_id(1) * vocab
    ids = first_id + jax.lax.broadcasted_iota(jnp.int32, (1, vocab), 1)
    is_loaded = ids < ref.shape[-1]
    if only_if is not None:
        is_loaded &= only_if
    x = pltriton.load(ref.at[*row, pl.ds(first_id, vocab)], mask=is_loaded, other=jnp.array(-jnp.inf, ref.dtype))
    x = x.astype(jnp.float32)
    if excluded_id >= 0:
        x = jnp.where(ids == excluded_id, -maths.INF, x)
    return x, ids


def _own(axis: int):
    """This program's index along a grid axis, as a slice: scalars stay [1, 1] arrays, which the shared maths takes."""
    return pl.ds(pl.program_id(axis), 1)


def _scalars(refs, own):
    return jax.tree.map(lambda ref: ref[own, :], refs)


def _call(kernel, inputs, dtypes, shape: tuple[int, ...], *, tiles: TritonTiles, interpret: bool, excluded_id: int):
    return pl.pallas_call(
        functools.partial(kernel, vocab=tiles.vocab, excluded_id=excluded_id),
        grid=shape[:2],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
        compiler_params=pltriton.CompilerParams(num_warps=tiles.num_warps, num_stages=1),
        interpret=interpret,
    )(*inputs)
