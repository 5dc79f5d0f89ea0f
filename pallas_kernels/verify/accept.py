"""Which drafts survive, from scalars alone: two probabilities and one uniform each."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Acceptance(NamedTuple):
    """Outcome of the tests.

    Attributes:
        accepted_len: drafts accepted, counted from the first; 0..num_proposals.
        accept_probs: min(1, p/q) of each draft given that all before it are right; 0 at and past `num_proposals`.
    """

    accepted_len: Int[Array, " B"]
    accept_probs: Float[Array, "B M"]


def accept(
    p_of_draft: Float[Array, "B M"],
    q_of_draft: Float[Array, "B M"],
    is_proposed: Bool[Array, "B M"],
    uniforms: Float[Array, "B M"] | None,
) -> Acceptance:
    """Accepts draft j with probability min(1, p_j / q_j), left to right, up to the first one refused.

    Args:
        p_of_draft: causal probability of each draft.
        q_of_draft: probability with which each was drafted.
        is_proposed: whether there is such a draft; elsewhere the other arrays may hold anything.
        uniforms: in [0, 1); None where every p is 0 or 1 and no chance is left.
    """
    # u q < p rather than u < p / q: q may be zero when an official draft was filtered out, and u < 1 makes p = q sure.
    bar = jnp.zeros_like(q_of_draft) if uniforms is None else uniforms * q_of_draft
    is_accepted = is_proposed & (bar < p_of_draft)
    accepted_len = jnp.sum(jnp.cumprod(is_accepted.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    ratio = jnp.where(q_of_draft > p_of_draft, p_of_draft / jnp.where(q_of_draft > 0, q_of_draft, 1.0), 1.0)
    return Acceptance(accepted_len, jnp.where(is_proposed, ratio, 0.0))
