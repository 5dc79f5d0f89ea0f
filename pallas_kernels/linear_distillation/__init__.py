"""How far one hidden state's token distribution is from another's, without the logits of all rows: the contract."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear_distillation import tiled
from pallas_kernels.vocab_shards import total_ids


def linear_distillation(
    student: Float[Array, "R D"],
    teacher: Float[Array, "R D"],
    weight: Float[Array, "V D"],
    row_weights: Float[Array, " R"],
    *,
    excluded_id: int,
    tile_rows: int = 512,
    vocab_axis: str | None = None,
    frozen_columns: int = 0,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Per-row divergences of q = `softmax(student @ weight.T)` from p = `softmax(teacher @ weight.T)`.

    kl[r] = sum_v p[r, v] log(p[r, v] / q[r, v]);  tv[r] = 1 - sum_v min(p[r, v], q[r, v]).
    Both distributions are over every token but `excluded_id`: the MASK id, which decoding never draws. A draft
    drawn from q and kept with probability min(1, p/q) is kept with probability 1 - tv.

    p is the target and constant: neither `teacher`, nor `weight` by way of p, receives a gradient. `weight`
    does by way of q. Where q and p tie on a token, tv's gradient takes it as one that q does not lack.

    Rows of weight 0 are dropped before any matrix product: they cost nothing and reach neither value nor
    gradient, whatever they hold. The results are *not* multiplied by the weight; the caller multiplies. The
    backward pass recomputes a tile's logits, and also drops the rows whose cotangents are 0.

    Args:
        student: hidden states behind q, any floating dtype.
        teacher: hidden states behind p, same shape and dtype.
        weight: rows of the head, same dtype.
        row_weights: 0 drops the row, any other value keeps it; receives no gradient.
        excluded_id: token outside both distributions, in [0, V).
        tile_rows: rows whose float32 logits, twice [tile_rows, V], exist at a time.
        vocab_axis: mesh axis over which V is cut, inside `jax.shard_map`: `weight` then holds this device's
            equal part, in order, and the devices of the axis hold the same rows.
        frozen_columns: the first columns of `weight` that nobody trains, as where a head of its own lies behind a
            frozen one: their gradient is not computed, and 0.

    Returns:
        kl and tv, float32, 0 on dropped rows. Both may be differentiated with respect to `student` and
        `weight`; the gradient of `weight` is accumulated over tiles in float32.

    Raises:
        ValueError: shapes disagree, `excluded_id` is no token, V is 1, `tile_rows` is less than 1, or not so many
            columns can be frozen.
        TypeError: the dtypes of `student`, `teacher` and `weight` differ or are not floating.

    Compaction gathers rows by index. Where rows are sharded over devices, call the op inside `jax.shard_map`,
    each device on its own rows, or the gathers become collectives.

    Source: ours; tv is one minus the expected acceptance of speculative sampling (arXiv 2211.17192).
    """
    rows, width = student.shape
    if teacher.shape != student.shape:
        raise ValueError(f"{teacher.shape=} must equal student.shape={student.shape}")
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"{weight.shape=}, but student.shape={student.shape} needs [V, {width}]")
    if row_weights.shape != (rows,):
        raise ValueError(f"{row_weights.shape=}, but student has {rows} rows: need ({rows},)")
    vocab_size = total_ids(weight.shape[0], vocab_axis)
    if not 0 <= excluded_id < vocab_size or vocab_size == 1:
        raise ValueError(f"{excluded_id=} must be one of several tokens, but {weight.shape=}")
    if tile_rows < 1:
        raise ValueError(f"{tile_rows=} must be at least 1")
    if not 0 <= frozen_columns <= width:
        raise ValueError(f"{frozen_columns=} must be in [0, {width}], the columns of weight")
    if not (student.dtype == teacher.dtype == weight.dtype and jnp.issubdtype(student.dtype, jnp.floating)):
        raise TypeError(f"{student.dtype=}, {teacher.dtype=} and {weight.dtype=} must be the same floating dtype")
    tile_rows = min(tile_rows, max(rows, 1))
    return tiled.linear_distillation(
        student, teacher, weight, row_weights, excluded_id, tile_rows, vocab_axis, frozen_columns
    )
