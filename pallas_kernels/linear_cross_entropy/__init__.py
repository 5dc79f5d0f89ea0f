"""Language-model head and cross-entropy in one op that never holds the logits of all rows: its contract."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy import tiled


def linear_cross_entropy(
    hidden: Float[Array, "R D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, " R"],
    row_weights: Float[Array, " R"],
    *,
    tile_rows: int = 1024,
    vocab_axis: str | None = None,
    frozen_columns: int = 0,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Per-row cross-entropy of `softmax(hidden @ weight.T)`.

    lse[r] = log sum_v exp(hidden[r] . weight[v]);  loss[r] = lse[r] - hidden[r] . weight[labels[r]].

    Rows of weight 0 are dropped before any matrix product: they cost nothing and reach neither value nor
    gradient, whatever their hidden state or label holds. The loss is *not* multiplied by the weight, so
    that one call serves several weighted sums; the caller multiplies. The backward pass recomputes a tile's
    logits, and also drops the rows whose cotangents are 0.

    Args:
        hidden: final hidden states, any floating dtype.
        weight: rows of the head, same dtype as `hidden`.
        labels: target ids in [0, V) where the row's weight is not 0, anything elsewhere. A label outside that
            range on a weighted row makes its loss NaN.
        row_weights: 0 drops the row, any other value keeps it; receives no gradient.
        tile_rows: rows whose float32 logits, [tile_rows, V], exist at a time.
        vocab_axis: mesh axis over which V is cut, inside `jax.shard_map`: `weight` then holds this device's
            equal part, in order, and the devices of the axis hold the same rows. Labels count over all of V.
        frozen_columns: the first columns of `weight` that nobody trains, as where a head of its own lies behind a
            frozen one: their gradient is not computed, and 0.

    Returns:
        The losses and the lse, float32, 0 on dropped rows. Both may be differentiated with respect to
        `hidden` and `weight`; the gradient of `weight` is accumulated over tiles in float32.

    Raises:
        ValueError: shapes disagree, `tile_rows` is less than 1, or not so many columns can be frozen.
        TypeError: `hidden` and `weight` differ in dtype or are not floating, or the labels are not integers.

    Compaction gathers rows by index. Where rows are sharded over devices, call the op inside `jax.shard_map`,
    each device on its own rows, or the gathers become collectives.
    """
    rows, width = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"{weight.shape=}, but hidden.shape={hidden.shape} needs [V, {width}]")
    if labels.shape != (rows,) or row_weights.shape != (rows,):
        raise ValueError(f"{labels.shape=} and {row_weights.shape=}, but hidden has {rows} rows: both need ({rows},)")
    if tile_rows < 1:
        raise ValueError(f"{tile_rows=} must be at least 1")
    if not 0 <= frozen_columns <= width:
        raise ValueError(f"{frozen_columns=} must be in [0, {width}], the columns of weight")
    if hidden.dtype != weight.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"{hidden.dtype=} and {weight.dtype=} must be the same floating dtype")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{labels.dtype=} is not an integer dtype")
    tile_rows = min(tile_rows, max(rows, 1))
    return tiled.linear_cross_entropy(hidden, weight, labels, row_weights, tile_rows, vocab_axis, frozen_columns)
