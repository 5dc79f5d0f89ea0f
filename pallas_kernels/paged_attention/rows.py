"""Query rows as the kernels see them: (token, head of the group) pairs of one key head, and what each may see."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_TREE_ROWS = 64  # bits of the two words in which a row's visible new rows are packed


class Limits(NamedTuple):
    """What each new token may see of the new tokens."""

    last_row: Int[Array, "B T"]  # the last of them; -1 for none
    low_bits: Int[Array, "B T"]  # bit u: new token u < 32 is seen
    high_bits: Int[Array, "B T"]  # bit u - 32: new token 32 <= u < 64 is seen


def pack_limits(visible: Bool[Array, "B T T"] | None, batch: int, tokens: int) -> Limits:
    """Packs `visible` into bits; None means strictly causal."""
    if visible is None:
        everything = jnp.full((batch, tokens), -1, jnp.int32)
        own = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
        return Limits(own, everything, everything)
    column = jnp.arange(tokens, dtype=jnp.int32)[None, None]
    last_row = jnp.max(jnp.where(visible, column, -1), axis=2)
    return Limits(last_row, _bits(visible[:, :, :32]), _bits(visible[:, :, 32:64]))


def pack_queries(q: Float[Array, "B T N H"], kv_heads: int, tile_rows: int) -> Float[Array, "B K R H"]:
    """Puts the rows that share a key head together, token after token, and rounds R = T * G up to whole tiles."""
    batch, tokens, heads, head_dim = q.shape
    groups = heads // kv_heads
    packed = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, groups, head_dim), 2, 1)
    packed = packed.reshape(batch, kv_heads, tokens * groups, head_dim)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, -tokens * groups % tile_rows), (0, 0)))


def unpack_rows(mixed: Float[Array, "B K R H"], tokens: int, heads: int) -> Float[Array, "B T N H"]:
    """The inverse of `pack_queries`."""
    batch, kv_heads, _, head_dim = mixed.shape
    groups = heads // kv_heads
    tokens_of_head = mixed[:, :, : tokens * groups].reshape(batch, kv_heads, tokens, groups, head_dim)
    return jnp.moveaxis(tokens_of_head, 1, 2).reshape(batch, tokens, heads, head_dim)


def num_new_seen(tile: int | Int[Array, ""], tile_rows: int, groups: int, tokens: int) -> Int[Array, ""]:
    """New tokens that some row of a tile may see: those up to the tile's last own token."""
    return jnp.minimum(((tile + 1) * tile_rows + groups - 1) // groups, tokens)


def _bits(visible: Bool[Array, "B T U"]) -> Int[Array, "B T"]:
    """At most 32 booleans as one word, the first in the lowest bit."""
    weights = jnp.left_shift(jnp.uint32(1), jnp.arange(visible.shape[2], dtype=jnp.uint32))[None, None]
    return jnp.sum(jnp.where(visible, weights, jnp.uint32(0)), axis=2, dtype=jnp.uint32).view(jnp.int32)
