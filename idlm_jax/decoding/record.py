"""What a forward committed: how much of it, its log-probabilities, and everything put at its place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.state import Committed, DecodeState, Finish, Logprobs


def how_many(
    state: DecodeState, candidates: Int[Array, "B C"], accepted_len: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Tokens to commit, cut at the first stop token and at the budget; and why the slot ends, if it does."""
    depths = jnp.arange(candidates.shape[1], dtype=jnp.int32)[None]
    is_stop = jnp.any(candidates[..., None] == state.stop_ids[:, None], axis=-1)
    is_stop &= depths <= accepted_len[:, None]
    until_stop = jnp.min(jnp.where(is_stop, depths + 1, candidates.shape[1] + 1), axis=1)
    budget = state.end - state.context_len - 1
    offered = jnp.minimum(accepted_len + 1, until_stop)
    is_running = state.finish == Finish.RUNNING
    num_committed = jnp.where(is_running, jnp.minimum(offered, budget), 0)
    finish = jnp.where(
        until_stop <= num_committed,
        jnp.int32(Finish.STOP),
        jnp.where(num_committed == budget, jnp.int32(Finish.LENGTH), jnp.int32(Finish.RUNNING)),
    )
    return num_committed, jnp.where(is_running, finish, state.finish)


def logprobs_of(plan: StepPlan, anchor_logits: Float[Array, "B C V"], candidates: Int[Array, "B C"]) -> Logprobs | None:
    """Log-probabilities of the candidates and of the likeliest ids in their places, if the plan reports any."""
    if plan.num_top_logprobs is None:
        return None
    is_mask_id = jnp.arange(anchor_logits.shape[2])[None, None] == plan.mask_token_id
    log_probs = jax.nn.log_softmax(jnp.where(is_mask_id, -jnp.inf, anchor_logits), axis=-1)
    chosen = jnp.take_along_axis(log_probs, candidates[..., None], axis=-1)[..., 0]
    top, top_ids = jax.lax.top_k(log_probs, plan.num_top_logprobs)
    return Logprobs(chosen, top_ids, top)


def record(state: DecodeState, committed: Committed) -> DecodeState:
    """Puts what a forward committed, and what it reports of that, at their absolute positions."""
    rows, depths = committed.tokens.shape
    depth = jnp.arange(depths, dtype=jnp.int32)[None]
    num_tokens = committed.num_tokens[:, None]
    first = state.context_len[:, None] + 1 - num_tokens
    # One past the end is dropped: the way to write nothing with a fixed shape.
    at = jnp.where(depth < num_tokens, first + depth, state.tokens.shape[1])
    slot = jnp.broadcast_to(jnp.arange(rows)[:, None], at.shape)
    tokens, logprobs, checksums = jax.tree.map(
        lambda buffer, new: buffer.at[slot, at].set(new, mode="drop"),
        (state.tokens, state.logprobs, state.checksums),
        (committed.tokens, committed.logprobs, committed.checksums),
    )
    return state._replace(tokens=tokens, logprobs=logprobs, checksums=checksums)
