"""The query rows of one forward: a plan of (token, position, visible prefix, group) that every method fills in.

    row      0        1 ... M      M+1 ... 2M     2M+1 ...
    holds    pending  drafts       group 0        group 1 ...
    sees     context, pending and drafts up to its own prefix, then its own group's earlier MASKs

AR is the plan without drafts or groups, and ISD has one group behind its last draft. Row w is written to cache slot
`start + w`; clean rows stand where they will stay if they are committed.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Window(NamedTuple):
    """Rows of one forward; W = clean rows + groups * MASKs."""

    tokens: Int[Array, "B W"]
    positions: Int[Array, "B W"]
    visible: Bool[Array, "B W W"]
    is_mask: Bool[Array, "B W"]


class Outputs(NamedTuple):
    """What the model makes of rows."""

    hidden: Float[Array, "B W D"]  # final hidden states
    logits: Float[Array, "B W V"]  # float32


def build_window(
    clean: Int[Array, "B C"],
    num_clean: Int[Array, " B"],
    start: Int[Array, " B"],
    group_prefix: Int[Array, "B P"],
    num_masks: int,
    mask_token_id: int,
) -> Window:
    """Lays out clean rows and MASK groups.

    Args:
        clean: tokens at positions start, start + 1, ...: the pending token and drafts, or a prompt.
        num_clean: how many of them are real; the rest is padding that no row sees.
        start: position of the first clean row.
        group_prefix: index of the last clean row that each group of MASKs sees.
        num_masks: MASK rows per group, M.
        mask_token_id: id fed at MASK rows.
    """
    batch, num_clean_rows = clean.shape
    num_groups = group_prefix.shape[1]
    num_mask_rows = num_groups * num_masks
    clean_index = jnp.arange(num_clean_rows, dtype=jnp.int32)
    # 1, 2, .. M within each group; 0 on clean rows.
    depth = jnp.concatenate(
        [jnp.zeros_like(clean_index), jnp.tile(jnp.arange(1, num_masks + 1, dtype=jnp.int32), num_groups)]
    )
    group = jnp.concatenate(
        [jnp.full_like(clean_index, -1), jnp.repeat(jnp.arange(num_groups, dtype=jnp.int32), num_masks)]
    )
    is_mask = group >= 0
    # Last clean row that each row sees: itself, or its group's prefix.
    prefix = jnp.concatenate(
        [jnp.broadcast_to(clean_index, clean.shape), jnp.repeat(group_prefix, num_masks, axis=1)], axis=1
    )
    sees_clean = (clean_index[None, None] <= prefix[..., None]) & (clean_index[None, None] < num_clean[:, None, None])
    same_group = (group[:, None] == group[None, num_clean_rows:]) & (depth[None, num_clean_rows:] <= depth[:, None])
    visible = jnp.concatenate([sees_clean, jnp.broadcast_to(same_group, (batch, *same_group.shape))], axis=-1)
    masks = jnp.full((batch, num_mask_rows), mask_token_id, jnp.int32)
    return Window(
        tokens=jnp.concatenate([clean, masks], axis=1),
        positions=start[:, None] + prefix + depth[None],
        visible=visible,
        is_mask=jnp.broadcast_to(is_mask, (batch, is_mask.shape[0])),
    )
