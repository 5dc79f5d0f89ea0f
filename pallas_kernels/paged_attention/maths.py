"""The arithmetic of the paged attention kernels, used verbatim by every Pallas body: 2-D tiles, float32 throughout.

Rows r of a tile are (token, query head of the group) pairs that share one key head; columns are key positions.
Scores carry a factor log2(e), so that every exponential is an exp2, the hardware's own.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row that has seen nothing yet stays free of inf - inf: a tile that is masked for a row is then an
# exact no-op for it, whatever the tile holds.
LOWEST = -1e30


class Running(NamedTuple):
    """State of the online softmax of a tile of rows."""

    top: Float[Array, "R 1"]  # largest score so far
    total: Float[Array, "R 1"]  # sum of exp2(score - top)
    mixed: Float[Array, "R H"]  # sum of exp2(score - top) * value


def nothing_seen(rows: int, head_dim: int) -> Running:
    """The state before the first tile."""
    column = jnp.zeros((rows, 1), jnp.float32)
    return Running(column + LOWEST, column, jnp.zeros((rows, head_dim), jnp.float32))


def is_visible(
    key_positions: Int[Array, "1 S"],
    context_len: Int[Array, ""],
    last_row: Int[Array, "R 1"],
    low_bits: Int[Array, "R 1"],
    high_bits: Int[Array, "R 1"],
) -> Bool[Array, "R S"]:
    """Which keys a row sees: all committed ones, and those new rows u <= last_row whose bit is set.

    Args:
        key_positions: absolute slots of the tile's keys.
        context_len: slots below it are committed.
        last_row: the last new row that may be seen; -1 for none.
        low_bits: bit u set: new row u < 32 is seen.
        high_bits: bit u - 32 set: new row 32 <= u < 64 is seen. Rows from 64 on are seen up to `last_row`.
    """
    new_row = key_positions - context_len
    word = jnp.where(new_row < 32, low_bits, high_bits)
    bit = jax.lax.shift_right_logical(word, jnp.broadcast_to(new_row & 31, word.shape)) & 1
    return (new_row < 0) | ((new_row <= last_row) & ((new_row >= 64) | (bit == 1)))


def attend_tile(
    running: Running,
    q: Float[Array, "R H"],
    k: Float[Array, "S H"],
    v: Float[Array, "S H"],
    visible: Bool[Array, "R S"],
) -> Running:
    """Adds one tile of keys.

    Values of unseen keys must be finite: their weight is exactly 0.
    """
    # bfloat16 products are exact in float32; float32 inputs must not go through tf32 or bfloat16 passes.
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract_heads = (((1,), (1,)), ((), ()))
    scores = jax.lax.dot_general(q, k, contract_heads, precision=exact, preferred_element_type=jnp.float32)
    scores *= math.log2(math.e) / math.sqrt(q.shape[1])
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.maximum(running.top, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - top)
    keep = jnp.exp2(running.top - top)
    total = running.total * keep + jnp.sum(weights, axis=1, keepdims=True)
    contract_keys = (((1,), (0,)), ((), ()))
    mixed = jax.lax.dot_general(
        weights.astype(v.dtype), v, contract_keys, precision=exact, preferred_element_type=jnp.float32
    )
    return Running(top, total, running.mixed * keep + mixed)


def merge(first: Running, second: Running) -> Running:
    """The state after the tiles of both; merging with `nothing_seen` changes no bit of `first`."""
    top = jnp.maximum(first.top, second.top)
    keep_first, keep_second = jnp.exp2(first.top - top), jnp.exp2(second.top - top)
    return Running(
        top,
        first.total * keep_first + second.total * keep_second,
        first.mixed * keep_first + second.mixed * keep_second,
    )


def finish(running: Running) -> Float[Array, "R H"]:
    """The attention output; 0 for a row that saw nothing."""
    return running.mixed / jnp.where(running.total > 0, running.total, 1.0)
