"""Row statistics and draws in plain jnp, with a sort."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.verify import threefry
from pallas_kernels.verify.maths import point_mass, probs, scaled
from pallas_kernels.verify.rows import Refused, RowStats


def row_stats(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    *,
    filtered: bool,
    excluded_id: int,
) -> RowStats:
    """The statistics as their contract states them; see the package for arguments and rules."""
    x = without(logits, excluded_id)
    top_id = jnp.argmax(x, axis=1)
    top_logit = jnp.max(x, axis=1, keepdims=True)
    threshold = jnp.full_like(top_logit, -jnp.inf)
    if filtered:
        descending = jnp.flip(jnp.sort(x, axis=1), axis=1)
        kth = jnp.take_along_axis(descending, jnp.maximum(top_k, 1)[:, None] - 1, axis=1)
        kth = jnp.where(top_k[:, None] > 0, kth, -jnp.inf)
        weights = jnp.where(descending >= kth, jnp.exp(scaled(descending, top_logit, temperature[:, None])), 0.0)
        mass_before = jnp.cumsum(weights, axis=1) - weights
        # The likeliest is kept even if top_p has underflowed to 0.
        limit = jnp.maximum(top_p[:, None] * jnp.sum(weights, axis=1, keepdims=True), threefry.TINY)
        nucleus = jnp.min(jnp.where(mass_before < limit, descending, jnp.inf), axis=1, keepdims=True)
        threshold = jnp.maximum(kth, jnp.where(top_p[:, None] < 1.0, nucleus, -jnp.inf))
    weights = jnp.where(x >= threshold, jnp.exp(scaled(x, top_logit, temperature[:, None])), 0.0)
    return RowStats(top_id.astype(jnp.int32), top_logit[:, 0], threshold[:, 0], jnp.sum(weights, axis=1))


def draw(
    logits: Float[Array, "B C V"],
    row: Int[Array, " B"],
    temperature: Float[Array, " B"],
    stats: RowStats,
    key: threefry.Key,
    refused: Refused | None,
    *,
    excluded_id: int,
) -> Int[Array, " B"]:
    """One id per request from max(0, p - q), or from p where nothing was refused or nothing is left.

    Args:
        logits: rows that p may be in.
        row: which of them.
        temperature: of each request, for p and q.
        stats: of the chosen rows.
        key: of each request's noise.
        refused: what is taken away from p; None for nothing.
        excluded_id: id that no distribution holds; -1 for none.
    """
    ids = jnp.broadcast_to(jnp.arange(logits.shape[2], dtype=jnp.int32)[None], (logits.shape[0], logits.shape[2]))
    key, temperature = threefry.Key(key.high[:, None], key.low[:, None]), temperature[:, None]
    p = probs(_chosen(logits, row, excluded_id), ids, temperature, as_columns(stats))
    weights = p
    if refused is not None:
        if refused.logits is None or refused.stats is None:
            q = point_mass(ids, refused.token[:, None])
        else:
            rows = _chosen(refused.logits, refused.row, excluded_id)
            q = probs(rows, ids, temperature, as_columns(refused.stats))
        residual = jnp.maximum(p - jnp.where(refused.is_refused[:, None], q, 0.0), 0.0)
        # Rounding can leave nothing of a residual whose exact mass is below 1e-7; p is then right to that accuracy.
        weights = jnp.where(jnp.any(residual > 0.0, axis=1, keepdims=True), residual, p)
    noise = threefry.gumbel(threefry.bits(key, ids.astype(jnp.uint32)))
    return jnp.argmax(jnp.log(weights) + noise, axis=1).astype(jnp.int32)


def without(logits: Float[Array, "R V"], excluded_id: int) -> Float[Array, "R V"]:
    """Float32 logits in which one id is impossible."""
    x = logits.astype(jnp.float32)
    return x if excluded_id < 0 else jnp.where(jnp.arange(x.shape[1])[None] == excluded_id, -jnp.inf, x)


def as_columns(stats: RowStats) -> RowStats:
    """[R] -> [R, 1]."""
    return jax.tree.map(lambda values: values[:, None], stats)


def _chosen(logits: Float[Array, "B C V"], row: Int[Array, " B"], excluded_id: int) -> Float[Array, "B V"]:
    return without(jnp.take_along_axis(logits, row[:, None, None], axis=1)[:, 0], excluded_id)
