"""Arithmetic on tiles of logits that the kernels share: statistics, thresholds without a sort, draws.

Every array is 2-D: [R, V] tiles of logits and [R, 1] columns, R rows at once (one in the Triton kernels). Ids outside
the vocabulary and the excluded id carry a logit of -inf, which has weight 0 and wins nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.verify import threefry
from pallas_kernels.verify.rows import RowStats

DIGIT_BITS = 4
NUM_SLOTS = 1 << DIGIT_BITS  # 15 thresholds between 16 digits, and one below everything for the total
SIGN = np.int32(-(2**31))
NOT_SIGN = np.int32(2**31 - 1)
INF = np.float32(np.inf)

# Thresholds [R, 16], and the smallest logit that weighs anything (None: every id counts 1) -> weight strictly above
# each one.
WeightAbove = Callable[[Array, Array | None], Array]


class Top(NamedTuple):
    """Running maximum of a row, its id, and the sum of exp((x - logit) / T) so far."""

    logit: Float[Array, "R 1"]
    id: Int[Array, "R 1"]
    mass: Float[Array, "R 1"]


class Best(NamedTuple):
    """Running winner of a draw."""

    score: Float[Array, "R 1"]
    id: Int[Array, "R 1"]


def scaled(
    x: Float[Array, "R _"], top_logit: Float[Array, "R _"], temperature: Float[Array, "R 1"]
) -> Float[Array, "R _"]:
    """(x - top) / T. The maximum is taken off first, which keeps 1e-30 a legal T: 0 / T is 0, the rest is -inf."""
    return (x - top_logit) / jnp.where(temperature == 0.0, np.float32(1.0), temperature)


def probs(
    x: Float[Array, "R _"], ids: Int[Array, "R _"], temperature: Float[Array, "R 1"], stats: RowStats
) -> Float[Array, "R _"]:
    """Probability of each id from its logit and the statistics of its row; a point mass where T = 0."""
    soft = jnp.exp(scaled(x, stats.top_logit, temperature)) / stats.mass
    kept = jnp.where(x >= stats.threshold, soft, np.float32(0.0))
    return jnp.where(temperature == 0.0, (ids == stats.top_id).astype(jnp.float32), kept)


def tile_top(x: Float[Array, "R V"], ids: Int[Array, "R V"], temperature: Float[Array, "R 1"]) -> Top:
    """Maximum, first id that has it, and mass of one tile."""
    logit = jnp.max(x, axis=1, keepdims=True)
    # A tile of nothing but -inf has no mass; measured from -inf it would have NaN.
    finite = jnp.where(logit == -INF, np.float32(0.0), logit)
    mass = jnp.sum(jnp.exp(scaled(x, finite, temperature)), axis=1, keepdims=True)
    return Top(logit, _first(x == logit, ids), mass)


def merge_tops(left: Top, right: Top, temperature: Float[Array, "R 1"]) -> Top:
    """Joins a tile to those before it; equals keep the earlier id."""
    logit = jnp.maximum(left.logit, right.logit)
    finite = jnp.where(logit == -INF, np.float32(0.0), logit)
    left_mass = left.mass * jnp.exp(scaled(left.logit, finite, temperature))
    right_mass = right.mass * jnp.exp(scaled(right.logit, finite, temperature))
    return Top(logit, jnp.where(right.logit > left.logit, right.id, left.id), left_mass + right_mass)


def order_key(x: Float[Array, "R _"]) -> Int[Array, "R _"]:
    """An integer that orders as the float does, with one image for both zeros."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, np.float32(0.0), x), jnp.int32)
    return jnp.where(bits < 0, bits ^ NOT_SIGN, bits)


def from_order_key(key: Int[Array, "R 1"]) -> Float[Array, "R 1"]:
    """The float whose `order_key` this is."""
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ NOT_SIGN, key), jnp.float32)


def tile_weight_above(
    x: Float[Array, "R V"],
    top_logit: Float[Array, "R 1"],
    temperature: Float[Array, "R 1"],
    thresholds: list[Array],
    floor: Array | None,
) -> list[Array]:
    """Weight of the ids whose key exceeds each threshold, of one tile: the search's inner loop.

    Float addition of numbers that are not negative is monotone, so in one order of summation more ids never weigh less.
    """
    keys = order_key(x)
    if floor is None:
        weights = jnp.ones_like(x)
    else:
        weights = jnp.where(x >= floor, jnp.exp(scaled(x, top_logit, temperature)), np.float32(0.0))
    return [
        jnp.sum(jnp.where(keys > threshold, weights, np.float32(0.0)), axis=1, keepdims=True)
        for threshold in thresholds
    ]


def filtered_stats(
    top: Top,
    temperature: Float[Array, "R 1"],
    top_k: Int[Array, "R 1"],
    top_p: Float[Array, "R 1"],
    weight_above: WeightAbove,
    *,
    num_digits: int,
    unroll: bool,
) -> RowStats:
    """Finishes the statistics of filtered rows: `num_digits` passes for top-k, as many for top-p.

    An id survives top-k if fewer than k ids lie strictly above it, and top-p if strictly less than top_p of the mass
    that survived does. Both are monotone in the logit, so each is one threshold. Counts are exact: float32 holds
    integers to 2^24. A row with both filters off keeps the bits that it has without the search.
    """
    has_k, has_p = top_k > 0, top_p < 1.0
    counts = jnp.where(has_k, top_k.astype(jnp.float32), INF)
    kth, _ = _find(lambda thresholds: weight_above(thresholds, None), lambda _: counts, top, num_digits, unroll)
    kth = jnp.where(has_k, kth, -INF)

    def allowed(total: Array) -> Array:
        # Above the likeliest id lies nothing, which must stay less than the limit.
        return jnp.where(has_p, jnp.maximum(top_p * total, threefry.TINY), INF)

    nucleus, mass = _find(lambda thresholds: weight_above(thresholds, kth), allowed, top, num_digits, unroll)
    threshold = jnp.where(has_p, nucleus, kth)
    return RowStats(top.id, top.logit, threshold, jnp.where(has_k | has_p, mass, top.mass))


def tile_draw(
    p: Float[Array, "R V"],
    q: Float[Array, "R V"] | None,
    ids: Int[Array, "R V"],
    key: threefry.Key,
) -> tuple[Best, Best | None]:
    """Best of max(0, p - q) and best of p in one tile, with the same noise; without a q the second is None.

    The first has a score of -inf if nothing of it is left in this tile.
    """
    noise = threefry.gumbel(threefry.bits(key, ids.astype(jnp.uint32)))
    plain = _best(jnp.log(p) + noise, ids)
    if q is None:
        return plain, None
    return _best(jnp.log(jnp.maximum(p - q, np.float32(0.0))) + noise, ids), plain


def merge_bests(left: Best, right: Best) -> Best:
    """Joins a tile to those before it; equals keep the earlier id."""
    is_better = right.score > left.score
    return Best(jnp.where(is_better, right.score, left.score), jnp.where(is_better, right.id, left.id))


def winner(best: Best, plain: Best | None) -> Int[Array, "R 1"]:
    """The drawn id. Rounding can leave nothing of a residual; p is then right to that accuracy."""
    return best.id if plain is None else jnp.where(best.score > -INF, best.id, plain.id)


def point_mass(ids: Int[Array, "R V"], token: Int[Array, "R 1"]) -> Float[Array, "R V"]:
    """Probability 1 on one id."""
    return (ids == token).astype(jnp.float32)


def _find(
    weight_above: Callable[[Array], Array],
    limit: Callable[[Array], Array],
    like: Top,
    num_digits: int,
    unroll: bool,
) -> tuple[Array, Array]:
    """Smallest float with a weight strictly above it under the limit, and the weight from it upwards.

    Settles one hexadecimal digit of its unsigned order image per pass, the highest first: 15 thresholds tell 16 digits
    apart.

    Args:
        weight_above: weight strictly above each of 16 keys, [R, 16] to [R, 16].
        limit: of the total weight.
        like: gives the shape of a column.
        num_digits: 8 for float32; 4 suffice when the floats are bfloat16 numbers.
        unroll: whether the passes are unrolled.
    """
    slot = jax.lax.broadcasted_iota(jnp.int32, (like.id.shape[0], NUM_SLOTS), 1)
    is_total = slot == NUM_SLOTS - 1

    def settle(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        image, weight = carry
        shift = (32 - DIGIT_BITS) - DIGIT_BITS * jnp.asarray(step, jnp.int32)
        below = jax.lax.shift_left(jnp.int32(1), shift) - jnp.int32(1)
        candidates = image | jax.lax.shift_left(slot, jnp.broadcast_to(shift, slot.shape)) | below
        above = weight_above(jnp.where(is_total, SIGN, candidates ^ SIGN))
        total = jnp.sum(jnp.where(is_total, above, np.float32(0.0)), axis=1, keepdims=True)
        is_too_low = (above >= limit(total)) & ~is_total
        digit = jnp.sum(is_too_low.astype(jnp.int32), axis=1, keepdims=True)
        # What lies above the last candidate that is too low, the least of them, lies at or above the digit after it.
        least = jnp.min(jnp.where(is_too_low, above, INF), axis=1, keepdims=True)
        weight = jnp.where(digit > 0, least, jnp.where(step == 0, total, weight))
        return image | jax.lax.shift_left(digit, jnp.broadcast_to(shift, digit.shape)), weight

    start = (jnp.zeros_like(like.id), jnp.zeros_like(like.logit))
    image, weight = jax.lax.fori_loop(0, num_digits, settle, start, unroll=unroll)
    key = image ^ SIGN
    # The digits not looked at are those of a number with a short mantissa: zeros, which are ones in a negative key.
    unseen = np.int32((1 << (32 - DIGIT_BITS * num_digits)) - 1)
    return from_order_key(jnp.where(key < 0, key | unseen, key)), weight


def _first(is_wanted: Bool[Array, "R V"], ids: Int[Array, "R V"]) -> Int[Array, "R 1"]:
    return jnp.min(jnp.where(is_wanted, ids, NOT_SIGN), axis=1, keepdims=True)


def _best(scores: Float[Array, "R V"], ids: Int[Array, "R V"]) -> Best:
    score = jnp.max(scores, axis=1, keepdims=True)
    return Best(score, _first(scores == score, ids))
