"""The arithmetic that every kernel body runs, on one tile: scores in base 2, online softmax, its derivative.

Only 2-D arrays with their reduced axes kept, so that the same lines lower through Triton and Mosaic. `scale` is
log2(e) / sqrt(H): exp2 of the scaled scores is exp of the scores over sqrt(H). Row statistics are float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Below any score, yet finite: the difference of two tops is never inf - inf. A masked score is -inf, so even a row
# that has seen nothing gives its masked keys weights of exactly 0.
NOTHING_SEEN = -1e30


class Mixture(NamedTuple):
    """Values mixed so far by R rows, not yet divided by their total weight."""

    mixed: Float[Array, "R H"]
    top: Float[Array, "R 1"]
    total: Float[Array, "R 1"]


def base2_scale(head_dim: int) -> float:
    """The factor between q.k and the scores, in base 2."""
    return math.log2(math.e) / math.sqrt(head_dim)


def no_mixture(rows: int, head_dim: int) -> Mixture:
    """What R rows hold before their first tile."""
    return Mixture(
        jnp.zeros((rows, head_dim), jnp.float32),
        jnp.full((rows, 1), NOTHING_SEEN, jnp.float32),
        jnp.zeros((rows, 1), jnp.float32),
    )


def mix_tile(
    seen: Mixture,
    q: Float[Array, "R H"],
    k: Float[Array, "S H"],
    v: Float[Array, "S H"],
    visible: Bool[Array, "R S"] | None,
    scale: float,
) -> Mixture:
    """Adds a tile of S keys; None for `visible` means all of them."""
    scores = dot_rows(q, k)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.maximum(seen.top, jnp.max(scores, axis=1, keepdims=True) * scale)
    weights = jnp.exp2(scores * scale - top)
    shrink = jnp.exp2(seen.top - top)
    return Mixture(
        seen.mixed * shrink + dot(weights.astype(v.dtype), v),
        top,
        seen.total * shrink + jnp.sum(weights, axis=1, keepdims=True),
    )


def finish(seen: Mixture) -> tuple[Float[Array, "R H"], Float[Array, "R 1"]]:
    """The mixed values and the log2 of the summed exp2 scores; both 0 in rows that saw nothing."""
    is_empty = seen.total == 0
    total = jnp.where(is_empty, 1.0, seen.total)
    return seen.mixed / total, jnp.where(is_empty, 0.0, seen.top + jnp.log2(total))


def differentiate_tile(
    looking: tuple[Float[Array, "X H"], Float[Array, "Y H"]],
    paying: tuple[Float[Array, "X H"], Float[Array, "Y H"]],
    lse: Float[Array, "_ _"],
    delta: Float[Array, "_ _"],
    visible: Bool[Array, "X Y"] | None,
    scale: float,
) -> tuple[Float[Array, "X Y"], Float[Array, "X Y"]]:
    """Attention weights of a tile and the cotangent of its scores, either way round.

    weight = exp2(scale * q.k - lse);  score_bar = weight * (out_bar . v - delta).

    Args:
        looking: (q, k), or (k, q) for the transposed tile.
        paying: (out_bar, v), or (v, out_bar).
        lse: of the queries, a column or, transposed, a row.
        delta: sum over H of out * out_bar, likewise.
        visible: None means all.
        scale: as in `mix_tile`. `score_bar` is that of the scores over sqrt(H).
    """
    weights = jnp.exp2(dot_rows(*looking) * scale - lse)
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    return weights, weights * (dot_rows(*paying) - delta)


def is_within(column: Int[Array, "_ _"], interval: tuple[Int[Array, "_ _"], Int[Array, "_ _"]]) -> Bool[Array, "_ _"]:
    """Which keys lie in the half-open interval of which row, by broadcasting."""
    first, end = interval
    return (first <= column) & (column < end)


def dot_rows(a: Float[Array, "X H"], b: Float[Array, "Y H"]) -> Float[Array, "X Y"]:
    """The product a @ b.T, accumulated in float32."""
    return _dot(a, b, 1)


def dot(a: Float[Array, "X Y"], b: Float[Array, "Y H"]) -> Float[Array, "X H"]:
    """The product a @ b, accumulated in float32."""
    return _dot(a, b, 0)


def _dot(a: Array, b: Array, contracted: int) -> Array:
    # Float32 inputs ask for float32 products; GPUs and TPUs would otherwise round them to fewer bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
