"""Which MASKs the rows of a forward hold: where drafts are most likely to be of use.

A MASK at depth d behind j drafts is of use if verification ends behind exactly these, and its own draft and the d - 1
before it are then accepted. The probabilities q of the drafts at hand say how likely the first is, and their mean how
good drafts are here. Both are known before the forward, as they must be: what is drafted must not depend on how
verification ends.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.state import DecodeState
from idlm_jax.decoding.window import Rows

# Acceptance of drafts to come over the mean q of those at hand. On the tiny model with a Markov head 0.8 gives 0.1 % to
# 1.3 % more tokens per forward than 1 (N=4 with 7 and 11 rows, N=8 with 15 and 22, T=0 and 1).
DISCOUNT = 0.8


def rows_of(plan: StepPlan, state: DecodeState) -> Rows:
    """The rows of a decode forward: the pending token, `state.num_proposals` drafts, and MASKs."""
    batch, num_drafts = len(state.pending), state.num_proposals[:, None]
    row = jnp.broadcast_to(jnp.arange(plan.window_len, dtype=jnp.int32)[None], (batch, plan.window_len))
    if plan.num_masks == 0:
        return Rows(row, jnp.zeros_like(row))
    ranked = _ranked(plan, state)
    rank = row - num_drafts - 1
    which = jnp.take_along_axis(ranked, jnp.clip(rank, 0, ranked.shape[1] - 1), axis=1)
    is_mask = (rank >= 0) & (rank < ranked.shape[1])
    # What is left over is padding.
    prefix, depth = which // plan.num_masks, which % plan.num_masks + 1
    return Rows(jnp.where(is_mask, prefix, row), jnp.where(is_mask, depth, 0))


def _ranked(plan: StepPlan, state: DecodeState) -> Int[Array, "B R"]:
    """MASKs in the order in which they get rows; depth d behind j drafts is number j * M + d - 1."""
    batch, num_masks = len(state.pending), plan.num_masks
    num_prefixes = num_masks + 1
    if not plan.places_masks:
        if plan.window_len > num_prefixes + num_masks:  # room for one group behind every prefix
            every = jnp.arange(num_prefixes * num_masks, dtype=jnp.int32)
            return jnp.broadcast_to(every[None], (batch, len(every)))
        return state.num_proposals[:, None] * num_masks + jnp.arange(num_masks, dtype=jnp.int32)[None]
    assert state.confidence is not None
    depth = jnp.arange(num_prefixes, dtype=jnp.int32)[None]
    accept = jnp.where(depth[:, 1:] <= state.num_proposals[:, None], state.confidence, 0.0)
    reached = jnp.cumprod(jnp.pad(accept, ((0, 0), (1, 0)), constant_values=1.0), axis=1)
    ends_here = reached * (1.0 - jnp.pad(accept, ((0, 0), (0, 1))))
    mean = jnp.sum(accept, axis=1) / jnp.maximum(state.num_proposals, 1).astype(jnp.float32)
    survives = (DISCOUNT * mean)[:, None] ** jnp.arange(num_masks, dtype=jnp.float32)[None]
    worth = (ends_here[..., None] * survives[:, None]).reshape(batch, -1)
    # Of equals the first comes first, so no prefix has a MASK without those before it.
    num_ranked = min(plan.window_len - 1, worth.shape[1])
    return jax.lax.top_k(worth, num_ranked)[1].astype(jnp.int32)
