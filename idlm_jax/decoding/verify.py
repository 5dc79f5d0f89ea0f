"""Introspective acceptance: which drafts survive, and the token that follows them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from idlm_jax.decoding.sampling import draw


class Verdict(NamedTuple):
    """Outcome of one verification.

    Attributes:
        accepted_len: drafts accepted, counted from the first; 0..num_proposals.
        next_token: the correction after a rejection, or the bonus when every draft survived.
        accept_probs: min(1, p/q) of each draft given that all before it are right; 0 at and past `num_proposals`.
    """

    accepted_len: Int[Array, " B"]
    next_token: Int[Array, " B"]
    accept_probs: Float[Array, "B M"]


def verify(
    anchor_probs: Float[Array, "B C V"],
    proposals: Int[Array, "B M"],
    proposal_probs: Float[Array, "B M V"],
    num_proposals: Int[Array, " B"],
    accept_uniforms: Float[Array, "B M"],
    commit_keys: Key[Array, "B C"],
) -> Verdict:
    """Accepts draft j with probability min(1, p_j/q_j), left to right; corrects the first one refused.

    The committed tokens are distributed as draws from p whatever q is (Leviathan et al. 2023, theorem 3.5; paper
    section on ISD), provided each draft was drawn from the recorded q. An argmax draft must therefore record a point
    mass: then it is accepted with probability p(d) and corrected by p without d.

    differs: the reference implementation records a soft q for argmax drafts and corrects from p; both change the
    distribution.

    Args:
        anchor_probs: p, C = M + 1 rows; row j is the causal distribution of the token that draft j proposes, row M
            that of the bonus.
        proposals: drafted ids; entries at and past `num_proposals` are ignored.
        proposal_probs: q, the distribution each draft was drawn from.
        num_proposals: drafts to check, 0..M; 0 is a cold start, which commits one token drawn from p_0.
        accept_uniforms: one uniform in [0, 1) per draft, keyed by the draft's position.
        commit_keys: key for the final draw, one for each place it may happen.
    """
    num_masks = proposals.shape[1]
    is_proposed = jnp.arange(num_masks)[None] < num_proposals[:, None]
    p_of_draft = jnp.take_along_axis(anchor_probs[:, :-1], proposals[..., None], axis=-1)[..., 0]
    q_of_draft = jnp.take_along_axis(proposal_probs, proposals[..., None], axis=-1)[..., 0]
    # u q < p rather than u < p / q: q may be zero when an official draft was filtered out, and u < 1 makes p = q sure.
    is_accepted = is_proposed & (accept_uniforms * q_of_draft < p_of_draft)
    accepted_len = jnp.sum(jnp.cumprod(is_accepted.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)

    # A row without a proposal has q = 0, so max(0, p - q) is p itself: the bonus needs no case of its own.
    refused_probs = jnp.where(is_proposed[..., None], proposal_probs, 0.0)
    refused_probs = jnp.concatenate([refused_probs, jnp.zeros_like(anchor_probs[:, :1])], axis=1)
    at = accepted_len[:, None, None]
    p_next = jnp.take_along_axis(anchor_probs, at, axis=1)
    residual = jnp.maximum(p_next - jnp.take_along_axis(refused_probs, at, axis=1), 0.0)
    # Rounding can leave nothing of a residual whose exact mass is below 1e-7; p is then right to that accuracy.
    has_mass = jnp.sum(residual, axis=-1, keepdims=True) > 0.0
    next_token = draw(jnp.where(has_mass, residual, p_next), jnp.take_along_axis(commit_keys, at[..., 0], axis=1))

    ratio = jnp.where(q_of_draft > p_of_draft, p_of_draft / jnp.where(q_of_draft > 0, q_of_draft, 1.0), 1.0)
    return Verdict(accepted_len, next_token[:, 0], jnp.where(is_proposed, ratio, 0.0))
