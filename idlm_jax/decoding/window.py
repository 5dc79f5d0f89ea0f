"""The query rows of one forward: a plan of (prefix, depth) that every method fills in.

    row      0        1 ... L      L+1 ...
    holds    pending  L drafts     MASKs, each `depth` places behind the prefix of the drafts that it takes for granted
    sees     context, pending and drafts up to its prefix, then the MASKs behind the same prefix up to its own depth

AR is the plan without drafts or MASKs; plain ISD has MASKs behind its last draft alone, and `placement` chooses among
prefixes. Row w is written to cache slot `start + w`; clean rows stand where they will stay if they are committed.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Window(NamedTuple):
    """Rows of one forward."""

    tokens: Int[Array, "B W"]
    positions: Int[Array, "B W"]
    visible: Bool[Array, "B W W"]
    is_mask: Bool[Array, "B W"]


class Outputs(NamedTuple):
    """What the model makes of rows."""

    hidden: Float[Array, "B W D"]  # final hidden states
    logits: Float[Array, "B W V"]  # float32


class Rows(NamedTuple):
    """What each row of a forward is for."""

    prefix: Int[Array, "B W"]  # the last clean row that it sees: itself, if it is one
    depth: Int[Array, "B W"]  # 1, 2, ... of the MASKs behind a prefix; 0 of clean rows


def build_window(
    clean: Int[Array, "B C"],
    num_clean: Int[Array, " B"],
    start: Int[Array, " B"],
    rows: Rows,
    mask_token_id: int,
) -> Window:
    """Lays out clean rows and MASKs.

    Args:
        clean: tokens at positions start, start + 1, ...: the pending token and drafts, or a prompt; C at most W.
        num_clean: how many of them are real; what is no MASK behind them is padding that no other row sees.
        start: position of the first clean row.
        rows: the plan; its clean rows come first.
        mask_token_id: id fed at MASK rows.
    """
    prefix, depth = rows
    num_rows = prefix.shape[1]
    is_mask = depth > 0
    index = jnp.arange(num_rows, dtype=jnp.int32)[None, None]
    is_clean_key = (~is_mask[:, None]) & (index < num_clean[:, None, None])
    sees_clean = is_clean_key & (index <= prefix[..., None])
    is_behind = is_mask[:, None] & (prefix[:, None] == prefix[..., None]) & (depth[:, None] <= depth[..., None])
    return Window(
        tokens=jnp.where(is_mask, mask_token_id, jnp.pad(clean, ((0, 0), (0, num_rows - clean.shape[1])))),
        positions=start[:, None] + prefix + depth,
        visible=sees_clean | is_behind,
        is_mask=is_mask,
    )
