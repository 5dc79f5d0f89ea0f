"""Row statistics and draws through Mosaic (TPU): one read of the logits from HBM however many passes a search takes.

Statistics: grid (blocks of rows). A block is 8 float32 or 16 bfloat16 rows of the whole vocabulary, resident in VMEM:
4.9 MB for Qwen3's 151,936 ids, twice that with the next block on its way, so the search's 1 + 2 * 8 passes (1 + 2 * 4
in bfloat16) read VMEM in chunks of `tiles.chunk` ids, a fixed order. The last chunk starts early enough to end with the
row; what it repeats is masked.

Draws: grid (blocks of requests, tiles of the vocabulary), the winner so far stays in the output block. The row of each
request is gathered by XLA, one row of p and one of q: a kernel that fetched them itself would hold one row in a tile of
eight sublanes, and this one works on eight requests at once.

Refuses, when compiled, a vocabulary that is no multiple of 128, and rows that do not fit VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import Body, device_kind, refuse
from pallas_kernels.tpu_interpreter import interpreter
from pallas_kernels.verify import maths, threefry
from pallas_kernels.verify.rows import Refused, RowStats
from pallas_kernels.verify.tiles import TpuTiles, tpu_tiles

# Of 128 MiB on v5e and v6e and 64 MiB on a core of the smallest generation supported; the rest is for the program.
MAX_RESIDENT_BYTES = 48 * 2**20
SCRATCH_BYTES = 8 * 2**20


def row_stats(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    *,
    filtered: bool,
    excluded_id: int,
    tiles: TpuTiles | None,
    interpret: bool,
) -> RowStats:
    """The statistics as their contract states them; see the package for arguments and rules."""
    num_rows, vocab_size = logits.shape
    tiles = tiles or tpu_tiles(device_kind())
    rows = min(32 // logits.dtype.itemsize, num_rows)
    resident_bytes = 2 * rows * vocab_size * logits.dtype.itemsize
    if resident_bytes > MAX_RESIDENT_BYTES:
        raise _refuse(f"holds {rows} whole rows twice, and {resident_bytes=} exceeds {MAX_RESIDENT_BYTES}")
    if vocab_size % 128 and not interpret:
        raise _refuse(f"needs a vocabulary that is a multiple of 128, got {vocab_size}")
    column = pl.BlockSpec((rows, 1), lambda block: (block, 0))
    dtypes = RowStats(jnp.int32, jnp.float32, jnp.float32, jnp.float32)
    stats = pl.pallas_call(
        functools.partial(
            _stats_kernel, chunk=min(tiles.chunk, vocab_size), filtered=filtered, excluded_id=excluded_id
        ),
        grid=(pl.cdiv(num_rows, rows),),
        in_specs=[pl.BlockSpec((rows, vocab_size), lambda block: (block, 0)), column, column, column],
        out_specs=[column] * 4,
        out_shape=[jax.ShapeDtypeStruct((num_rows, 1), dtype) for dtype in dtypes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=resident_bytes + SCRATCH_BYTES
        ),
        interpret=interpreter(interpret),
        name="row_stats",
    )(logits, temperature[:, None], top_k[:, None], top_p[:, None])
    return RowStats(*(column[:, 0] for column in stats))


def draw(
    logits: Float[Array, "B C V"],
    row: Int[Array, " B"],
    temperature: Float[Array, " B"],
    stats: RowStats,
    key: threefry.Key,
    refused: Refused | None,
    *,
    excluded_id: int,
    tiles: TpuTiles | None,
    interpret: bool,
) -> Int[Array, " B"]:
    """One id per request from max(0, p - q), or from p; arguments as in the reference."""
    batch, _, vocab_size = logits.shape
    rows = min(32 // logits.dtype.itemsize, batch)
    vocab = min((tiles or tpu_tiles(device_kind())).draw, vocab_size)
    if refused is not None:
        q_rows = None if refused.logits is None else _gathered(refused.logits, refused.row)
        refused = refused._replace(is_refused=refused.is_refused.astype(jnp.int32), logits=q_rows)
    inputs = (_gathered(logits, row), temperature, stats, key, refused)
    inputs = jax.tree.map(lambda values: values if values.ndim == 2 else values[:, None], inputs)
    column = pl.BlockSpec((rows, 1), lambda block, tile: (block, 0))
    tile = pl.BlockSpec((rows, vocab), lambda block, tile: (block, tile))
    dtypes = [jnp.float32, jnp.int32] * (1 if refused is None else 2)
    parts = pl.pallas_call(
        functools.partial(_draw_kernel, vocab_size=vocab_size, excluded_id=excluded_id),
        grid=(pl.cdiv(batch, rows), pl.cdiv(vocab_size, vocab)),
        in_specs=jax.tree.map(lambda values: tile if values.shape[1] == vocab_size else column, inputs),
        out_specs=[column] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct((batch, 1), dtype) for dtype in dtypes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpreter(interpret),
        name="draw",
    )(*inputs)
    plain = None if refused is None else maths.Best(*parts[2:])
    return maths.winner(maths.Best(*parts[:2]), plain)[:, 0]


def _stats_kernel(
    logits_ref, temperature_ref, top_k_ref, top_p_ref, *out_refs, chunk: int, filtered: bool, excluded_id: int
) -> None:
    rows, vocab_size = logits_ref.shape
    temperature = temperature_ref[...]

    def load(number: Array) -> tuple[Array, Array]:
        first_id = number * chunk
        start = jnp.minimum(first_id, vocab_size - chunk)
        if vocab_size % 128 == 0:
            start = pl.multiple_of(start, 128)
        ids = start + jax.lax.broadcasted_iota(jnp.int32, (rows, chunk), 1)
        x = logits_ref[:, pl.ds(start, chunk)].astype(jnp.float32)
        return jnp.where((ids >= first_id) & (ids != excluded_id), x, -maths.INF), ids

    def each_chunk(step, start):
        return jax.lax.fori_loop(0, pl.cdiv(vocab_size, chunk), step, start)

    def join_top(number: Array, top: maths.Top) -> maths.Top:
        return maths.merge_tops(top, maths.tile_top(*load(number), temperature), temperature)

    zeros = jnp.zeros((rows, 1), jnp.float32)
    top = each_chunk(join_top, maths.Top(zeros - maths.INF, jnp.zeros((rows, 1), jnp.int32), zeros))
    stats = RowStats(top.id, top.logit, zeros - maths.INF, top.mass)
    if filtered:
        slot = jax.lax.broadcasted_iota(jnp.int32, (rows, maths.NUM_SLOTS), 1)

        def weight_above(thresholds: Array, floor: Array | None) -> Array:
            columns = [thresholds[:, number : number + 1] for number in range(maths.NUM_SLOTS)]

            def add(number: Array, weights: list[Array]) -> list[Array]:
                more = maths.tile_weight_above(load(number)[0], top.logit, temperature, columns, floor)
                return [weight + other for weight, other in zip(weights, more, strict=True)]

            weights = each_chunk(add, [zeros] * maths.NUM_SLOTS)
            above = jnp.zeros(slot.shape, jnp.float32)
            for number, weight in enumerate(weights):
                above = jnp.where(slot == number, weight, above)
            return above

        num_digits = 4 if logits_ref.dtype == jnp.bfloat16 else 8
        stats = maths.filtered_stats(
            top, temperature, top_k_ref[...], top_p_ref[...], weight_above, num_digits=num_digits, unroll=False
        )
    for ref, values in zip(out_refs, stats, strict=True):
        ref[...] = values


def _draw_kernel(
    logits_ref, temperature_ref, stats_refs, key_refs, refused, *out_refs, vocab_size: int, excluded_id: int
) -> None:
    ids = pl.program_id(1) * logits_ref.shape[1] + jax.lax.broadcasted_iota(jnp.int32, logits_ref.shape, 1)
    temperature = temperature_ref[...]

    def probs(ref, stats: RowStats) -> Array:
        x = jnp.where((ids < vocab_size) & (ids != excluded_id), ref[...].astype(jnp.float32), -maths.INF)
        return maths.probs(x, ids, temperature, jax.tree.map(lambda stat: stat[...], stats))

    q = None
    if refused is not None:
        no_row = refused.logits is None
        q = maths.point_mass(ids, refused.token[...]) if no_row else probs(refused.logits, refused.stats)
        q = jnp.where(refused.is_refused[...] != 0, q, jnp.float32(0.0))
    key = threefry.Key(*(word[...] for word in key_refs))
    bests = [best for best in maths.tile_draw(probs(logits_ref, stats_refs), q, ids, key) if best is not None]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for score_ref, id_ref in zip(out_refs[::2], out_refs[1::2], strict=True):
            score_ref[...] = jnp.full(score_ref.shape, -maths.INF)
            id_ref[...] = jnp.zeros(id_ref.shape, jnp.int32)

    for score_ref, id_ref, best in zip(out_refs[::2], out_refs[1::2], bests, strict=True):
        score_ref[...], id_ref[...] = maths.merge_bests(maths.Best(score_ref[...], id_ref[...]), best)


def _gathered(logits: Float[Array, "B C V"], row: Int[Array, " B"]) -> Float[Array, "B V"]:
    if logits.shape[1] == 1:
        return logits[:, 0]
    return jnp.take_along_axis(logits, row[:, None, None], axis=1)[:, 0]


def _refuse(reason: str) -> NotImplementedError:
    return refuse("verify", Body.TPU, reason, (Body.REFERENCE, Body.TRITON, Body.TPU))
