"""The op in tiles of rows, in plain XLA: a loop that ends with the last row that matters.

The rows that matter are numbered first (`compact`). The trip count is therefore data, which autodiff cannot
reverse: forward and backward are two loops under one `custom_vjp`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_tiles import compact, put, take, tile_index
from pallas_kernels.vocab_shards import equal_trips, first_id, log_sum_exp, total, total_ids

Residuals = tuple[Float[Array, "R D"], Float[Array, "V D"], Int[Array, " R"], Float[Array, " R"], Float[Array, " R"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_cross_entropy(
    hidden: Float[Array, "R D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, " R"],
    row_weights: Float[Array, " R"],
    tile_rows: int,
    vocab_axis: str | None,
    frozen_columns: int,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Losses and lse, float32, 0 on rows of weight 0; the package documents the arguments."""
    return _forward(hidden, weight, labels, row_weights, tile_rows, vocab_axis, frozen_columns)[0]


def _forward(
    hidden: Float[Array, "R D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, " R"],
    row_weights: Float[Array, " R"],
    tile_rows: int,
    vocab_axis: str | None,
    frozen_columns: int,
) -> tuple[tuple[Float[Array, " R"], Float[Array, " R"]], Residuals]:
    del frozen_columns
    index, num_tiles = compact(row_weights != 0, tile_rows)
    num_rows, num_ids = hidden.shape[0], weight.shape[0]
    columns = labels - first_id(num_ids, vocab_axis)
    is_here, is_token = (0 <= columns) & (columns < num_ids), (0 <= labels) & (labels < total_ids(num_ids, vocab_axis))

    def tile(number: Int[Array, ""], outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = tile_index(index, number, tile_rows)
        logits = _tile_logits(take(hidden, rows), weight)
        lse = log_sum_exp(logits, vocab_axis)
        at_column = jnp.take_along_axis(logits, take(columns, rows)[:, None], axis=1, mode="clip")[:, 0]
        at_label = total(jnp.where(take(is_here, rows), at_column, 0.0), vocab_axis)
        loss = jnp.where(take(is_token, rows), lse - at_label, jnp.nan)
        return put(outputs[0], rows, loss), put(outputs[1], rows, lse)

    zeros = jnp.zeros((num_rows,), jnp.float32)
    loss, lse = jax.lax.fori_loop(0, equal_trips(num_tiles, vocab_axis), tile, (zeros, zeros))
    return (loss, lse), (hidden, weight, labels, row_weights, lse)


def _backward(
    tile_rows: int,
    vocab_axis: str | None,
    frozen_columns: int,
    residuals: Residuals,
    cotangents: tuple[Float[Array, " R"], Float[Array, " R"]],
) -> tuple[Float[Array, "R D"], Float[Array, "V D"], None, None]:
    hidden, weight, labels, row_weights, lse = residuals
    # What the forward pass summed over the axis came out on each of its devices: `shard_map` splits its cotangent.
    loss_bar, lse_bar = (total(cotangent, vocab_axis) for cotangent in cotangents)
    # A row whose loss nobody differentiates (a metric, a frozen stream) is dropped as well.
    index, num_tiles = compact((row_weights != 0) & ((loss_bar != 0) | (lse_bar != 0)), tile_rows)
    ids = (first_id(weight.shape[0], vocab_axis) + jnp.arange(weight.shape[0], dtype=labels.dtype))[None]

    def tile(number: Int[Array, ""], grads: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = tile_index(index, number, tile_rows)
        tile_hidden = take(hidden, rows)
        probs = jnp.exp(_tile_logits(tile_hidden, weight) - take(lse, rows)[:, None])
        to_loss = take(loss_bar, rows)[:, None]
        at_label = jnp.where(ids == take(labels, rows)[:, None], to_loss, 0.0)
        # Cast so that both products run in the dtype of the inputs; their sums stay float32.
        logits_bar = ((to_loss + take(lse_bar, rows)[:, None]) * probs - at_label).astype(hidden.dtype)
        hidden_bar = jnp.einsum("RV,VD->RD", logits_bar, weight, preferred_element_type=jnp.float32)
        trained = tile_hidden[:, frozen_columns:]
        weight_bar = jnp.einsum("RV,RD->VD", logits_bar, trained, preferred_element_type=jnp.float32)
        return put(grads[0], rows, hidden_bar.astype(hidden.dtype)), grads[1] + weight_bar

    num_ids, width = weight.shape
    zeros = jnp.zeros(hidden.shape, hidden.dtype), jnp.zeros((num_ids, width - frozen_columns), jnp.float32)
    # Of a cut vocabulary `hidden_bar` is this device's part; `shard_map` sums what its inputs have in common.
    hidden_bar, weight_bar = jax.lax.fori_loop(0, num_tiles, tile, zeros)
    return hidden_bar, jnp.pad(weight_bar.astype(weight.dtype), ((0, 0), (frozen_columns, 0))), None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _tile_logits(tile_hidden: Float[Array, "I D"], weight: Float[Array, "V D"]) -> Float[Array, "I V"]:
    return jnp.einsum("ID,VD->IV", tile_hidden, weight, preferred_element_type=jnp.float32)
