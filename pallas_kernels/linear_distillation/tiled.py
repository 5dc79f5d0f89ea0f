"""The op in tiles of rows, in plain XLA: a loop that ends with the last row that matters.

The trip count is data, which autodiff cannot reverse: forward and backward are two loops under one
`custom_vjp`. With b the logits of q, and m_v = 1 where q_v < p_v, else 0,

    d kl / d b_v = q_v - p_v;      d tv / d b_v = q_v (sum_w m_w q_w - m_v).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_tiles import compact, put, take, tile_index
from pallas_kernels.vocab_shards import equal_trips, first_id, log_softmax, total

Residuals = tuple[Float[Array, "R D"], Float[Array, "R D"], Float[Array, "V D"], Float[Array, " R"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def linear_distillation(
    student: Float[Array, "R D"],
    teacher: Float[Array, "R D"],
    weight: Float[Array, "V D"],
    row_weights: Float[Array, " R"],
    excluded_id: int,
    tile_rows: int,
    vocab_axis: str | None,
    frozen_columns: int,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Both divergences, float32, 0 on rows of weight 0; the package documents the arguments."""
    return _forward(student, teacher, weight, row_weights, excluded_id, tile_rows, vocab_axis, frozen_columns)[0]


def _forward(
    student: Float[Array, "R D"],
    teacher: Float[Array, "R D"],
    weight: Float[Array, "V D"],
    row_weights: Float[Array, " R"],
    excluded_id: int,
    tile_rows: int,
    vocab_axis: str | None,
    frozen_columns: int,
) -> tuple[tuple[Float[Array, " R"], Float[Array, " R"]], Residuals]:
    del frozen_columns
    index, num_tiles = compact(row_weights != 0, tile_rows)

    def tile(number: Int[Array, ""], outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = tile_index(index, number, tile_rows)
        log_q = _log_probs(take(student, rows), weight, excluded_id, vocab_axis)
        log_p = _log_probs(take(teacher, rows), weight, excluded_id, vocab_axis)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        # The excluded token is -inf in both: its difference is NaN, its share 0.
        kl = jnp.sum(jnp.where(_is_excluded(log_p, excluded_id, vocab_axis), 0.0, p * (log_p - log_q)), axis=-1)
        # 1 - sum min(p, q), without the cancellation: p and q sum to one.
        tv = jnp.sum(jnp.maximum(p - q, 0.0), axis=-1)
        kl, tv = total(kl, vocab_axis), total(tv, vocab_axis)
        return put(outputs[0], rows, kl), put(outputs[1], rows, tv)

    zeros = jnp.zeros(row_weights.shape, jnp.float32)
    kl, tv = jax.lax.fori_loop(0, equal_trips(num_tiles, vocab_axis), tile, (zeros, zeros))
    return (kl, tv), (student, teacher, weight, row_weights)


def _backward(
    excluded_id: int,
    tile_rows: int,
    vocab_axis: str | None,
    frozen_columns: int,
    residuals: Residuals,
    cotangents: tuple[Float[Array, " R"], Float[Array, " R"]],
) -> tuple[Float[Array, "R D"], None, Float[Array, "V D"], None]:
    student, teacher, weight, row_weights = residuals
    # What the forward pass summed over the axis came out on each of its devices: `shard_map` splits its cotangent.
    kl_bar, tv_bar = (total(cotangent, vocab_axis) for cotangent in cotangents)
    # A row whose divergences nobody differentiates is dropped as well.
    index, num_tiles = compact((row_weights != 0) & ((kl_bar != 0) | (tv_bar != 0)), tile_rows)

    def tile(number: Int[Array, ""], grads: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = tile_index(index, number, tile_rows)
        tile_student = take(student, rows)
        q = jnp.exp(_log_probs(tile_student, weight, excluded_id, vocab_axis))
        p = jnp.exp(_log_probs(take(teacher, rows), weight, excluded_id, vocab_axis))
        lacking = jnp.where(q < p, q, 0.0)
        to_kl, to_tv = take(kl_bar, rows)[:, None], take(tv_bar, rows)[:, None]
        mass = total(jnp.sum(lacking, axis=-1, keepdims=True), vocab_axis)
        logits_bar = to_kl * (q - p) + to_tv * (q * mass - lacking)
        # Cast so that both products run in the dtype of the inputs; their sums stay float32.
        logits_bar = logits_bar.astype(student.dtype)
        student_bar = jnp.einsum("IV,VD->ID", logits_bar, weight, preferred_element_type=jnp.float32)
        trained = tile_student[:, frozen_columns:]
        weight_bar = jnp.einsum("IV,ID->VD", logits_bar, trained, preferred_element_type=jnp.float32)
        return put(grads[0], rows, student_bar.astype(student.dtype)), grads[1] + weight_bar

    num_ids, width = weight.shape
    zeros = jnp.zeros(student.shape, student.dtype), jnp.zeros((num_ids, width - frozen_columns), jnp.float32)
    # Of a cut vocabulary `student_bar` is this device's part; `shard_map` sums what its inputs have in common.
    student_bar, weight_bar = jax.lax.fori_loop(0, equal_trips(num_tiles, vocab_axis), tile, zeros)
    return student_bar, None, jnp.pad(weight_bar.astype(weight.dtype), ((0, 0), (frozen_columns, 0))), None


linear_distillation.defvjp(_forward, _backward)


def _log_probs(
    tile_hidden: Float[Array, "I D"], weight: Float[Array, "V D"], excluded_id: int, vocab_axis: str | None
) -> Float[Array, "I V"]:
    logits = jnp.einsum("ID,VD->IV", tile_hidden, weight, preferred_element_type=jnp.float32)
    return log_softmax(jnp.where(_is_excluded(logits, excluded_id, vocab_axis), -jnp.inf, logits), vocab_axis)


def _is_excluded(logits: Float[Array, "I V"], excluded_id: int, vocab_axis: str | None) -> Array:
    ids = first_id(logits.shape[1], vocab_axis) + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return ids == excluded_id
