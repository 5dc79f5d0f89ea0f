"""One forward of a running batch: verify the drafts, commit what survives, draft anew. Also the prefill.

Both end in the same `_commit_and_draft`; a prefill is a forward whose clean rows are the prompt and which has nothing
to verify. Every function here is pure and traced; the compiled entry points live in `loop.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idlm_jax.array_types import Hidden
from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.sampling import (
    Purpose,
    draw,
    remove_token,
    request_keys,
    target_probs,
    uniforms,
)
from idlm_jax.decoding.state import Counts, DecodeState, Finish
from idlm_jax.decoding.verify import Verdict, verify
from idlm_jax.decoding.window import build_window
from idlm_jax.model.attention import paged_attend
from idlm_jax.model.transformer import Qwen3


def prefill(module: Qwen3, plan: StepPlan, state: DecodeState, num_rows: int) -> DecodeState:
    """Reads the prompts, commits each one's first token and drafts behind it, so no decode step starts cold.

    Every prompt is followed by its MASKs at once, so strict causality is all the attention there is; what follows
    them is padding that nobody sees, in slots that the next forward overwrites.

    Args:
        module: the model.
        plan: static description of the step.
        state: fresh from `initial_state`.
        num_rows: static length of the padded prompts.
    """
    prompt_len = (state.context_len + 1)[:, None]
    index = jnp.arange(num_rows + plan.num_masks, dtype=jnp.int32)[None]
    is_mask = (index >= prompt_len) & (index < prompt_len + plan.num_masks)
    prompts = jnp.pad(state.tokens[:, :num_rows], ((0, 0), (0, plan.num_masks)))
    start = jnp.zeros_like(state.context_len)
    num_pages = -(-index.shape[1] // state.cache.page_size)
    hidden, cache = module.hidden_states(
        jnp.where(is_mask, plan.mask_token_id, prompts),
        jnp.broadcast_to(index, is_mask.shape),
        paged_attend(state.page_table[:, :num_pages], start, None, module.config.kernels),
        carried=state.cache,
        lora_gate=is_mask,
    )
    # The last prompt token is the one anchor, with no draft to verify; the one group took no draft for granted.
    rows = state.context_len[:, None] + jnp.arange(plan.num_masks + 1, dtype=jnp.int32)[None]
    used = jnp.take_along_axis(hidden, rows[..., None], axis=1)
    return _commit_and_draft(module, plan, state._replace(cache=cache), used[:, :1], used[:, 1:], start[:, None])


def decode_step(module: Qwen3, plan: StepPlan, state: DecodeState) -> DecodeState:
    """One forward for every running slot; finished slots are computed along and left as they are."""
    num_clean_rows = plan.num_masks + 1
    pending = jnp.take_along_axis(state.tokens, state.context_len[:, None], axis=1)
    group_prefix = state.num_proposals[:, None]  # one group, behind the last draft
    window = build_window(
        jnp.concatenate([pending, state.proposals], axis=1),
        state.num_proposals + 1,
        state.context_len,
        group_prefix,
        plan.num_masks,
        plan.mask_token_id,
    )
    hidden, cache = module.hidden_states(
        window.tokens,
        window.positions,
        # MASK and rejected rows are written too; `context_len` will not cover them.
        paged_attend(state.page_table, state.context_len, window.visible, module.config.kernels),
        carried=state.cache,
        lora_gate=window.is_mask,
    )
    state = state._replace(cache=cache)
    return _commit_and_draft(module, plan, state, hidden[:, :num_clean_rows], hidden[:, num_clean_rows:], group_prefix)


def _commit_and_draft(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    anchors: Float[Array, "B C D"],
    mask_rows: Float[Array, "B X D"],
    group_prefix: Int[Array, "B P"],
) -> DecodeState:
    """Turns hidden states into committed tokens and new proposals.

    Args:
        module: the model, for its head.
        plan: static description of the step.
        state: with the cache already extended.
        anchors: hidden states of the pending token and of every draft; of the pending token alone in a prefill.
        mask_rows: hidden states of all MASK groups, group after group.
        group_prefix: drafts that each group took for granted.
    """
    num_checked = anchors.shape[1] - 1
    raw = remove_token(module.logits(anchors), plan.mask_token_id)
    depths = jnp.arange(num_checked + 1, dtype=jnp.int32)
    commit_at = state.context_len[:, None] + 1 + depths[None]  # where each possible commit lands
    seeds = state.sampling.seed
    verdict = verify(
        target_probs(raw, state.sampling, filtered=plan.filtered),
        state.proposals[:, :num_checked],
        state.proposal_probs[:, :num_checked],
        jnp.minimum(state.num_proposals, num_checked),
        uniforms(request_keys(seeds, commit_at[:, :-1], Purpose.ACCEPT)),
        request_keys(seeds, commit_at, Purpose.COMMIT),
    )
    drafts = jnp.concatenate(
        [state.proposals[:, :num_checked], jnp.zeros_like(state.proposals, shape=(raw.shape[0], 1))], axis=1
    )
    is_final = depths[None] == verdict.accepted_len[:, None]
    candidates = jnp.where(is_final, verdict.next_token[:, None], drafts)
    num_committed, finish = _how_many(state, candidates, verdict.accepted_len)
    is_running = state.finish == Finish.RUNNING
    counts = _count(state, verdict, num_committed, is_running)
    state = _write_tokens(state, plan, raw, candidates, commit_at, num_committed)
    state = state._replace(context_len=state.context_len + num_committed, finish=finish, counts=counts)
    return _draft(module, plan, state, mask_rows, group_prefix, verdict.accepted_len)


def _how_many(
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


def _count(state: DecodeState, verdict: Verdict, num_committed: Int[Array, " B"], is_running: Array) -> Counts:
    """Adds one forward. A draft counts as verified if its fate decided a committed token."""
    counts = state.counts
    num_checked = verdict.accept_probs.shape[1]
    depths = jnp.arange(num_checked)[None]
    is_verified = (
        (depths < state.num_proposals[:, None])
        & (depths <= verdict.accepted_len[:, None])
        & (depths < num_committed[:, None])
    )
    is_cold = is_running & (state.num_proposals == 0) & (num_checked > 0)
    is_accepted = is_verified & (depths < verdict.accepted_len[:, None])
    pad = ((0, 0), (0, counts.verified.shape[1] - num_checked))
    return Counts(
        forwards=counts.forwards + is_running.astype(jnp.int32),
        cold_starts=counts.cold_starts + is_cold.astype(jnp.int32),
        verified=counts.verified + jnp.pad(is_verified.astype(jnp.int32), pad),
        accepted=counts.accepted + jnp.pad(is_accepted.astype(jnp.int32), pad),
        accept_prob=counts.accept_prob + jnp.pad(jnp.where(is_verified, verdict.accept_probs, 0.0), pad),
    )


def _write_tokens(
    state: DecodeState,
    plan: StepPlan,
    raw: Float[Array, "B C V"],
    candidates: Int[Array, "B C"],
    commit_at: Int[Array, "B C"],
    num_committed: Int[Array, " B"],
) -> DecodeState:
    """Puts committed tokens and their log-probabilities at their absolute positions."""
    rows, depths = candidates.shape
    is_committed = jnp.arange(depths)[None] < num_committed[:, None]
    # One past the end is dropped: the way to write nothing with a fixed shape.
    at = jnp.where(is_committed, commit_at, state.tokens.shape[1])
    slot = jnp.broadcast_to(jnp.arange(rows)[:, None], at.shape)
    log_probs = jax.nn.log_softmax(raw, axis=-1)
    chosen = jnp.take_along_axis(log_probs, candidates[..., None], axis=-1)[..., 0]
    top_logprobs, top_ids = jax.lax.top_k(log_probs, plan.num_top_logprobs)
    return state._replace(
        tokens=state.tokens.at[slot, at].set(candidates, mode="drop"),
        logprobs=state.logprobs.at[slot, at].set(chosen, mode="drop"),
        top_ids=state.top_ids.at[slot, at].set(top_ids, mode="drop"),
        top_logprobs=state.top_logprobs.at[slot, at].set(top_logprobs, mode="drop"),
    )


def _draft(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    mask_rows: Hidden,
    group_prefix: Int[Array, "B P"],
    accepted_len: Int[Array, " B"],
) -> DecodeState:
    """Draws proposals from the group that stands behind exactly the accepted drafts; none means a cold start."""
    if plan.num_masks == 0:
        return state
    batch, num_groups = group_prefix.shape
    matches = group_prefix == accepted_len[:, None]
    groups = mask_rows.reshape(batch, num_groups, plan.num_masks, -1)
    chosen = jnp.take_along_axis(groups, jnp.argmax(matches, axis=1)[:, None, None, None], axis=1)[:, 0]
    raw = remove_token(module.logits(chosen), plan.mask_token_id)
    probs = target_probs(raw, state.sampling, filtered=plan.filtered)
    # MASK k behind the accepted drafts predicts the token k places after the one just committed.
    draft_at = state.context_len[:, None] + 1 + jnp.arange(plan.num_masks, dtype=jnp.int32)[None]
    if plan.argmax_proposals:
        proposals = jnp.argmax(probs, axis=-1).astype(jnp.int32)
        if not plan.soft_proposal_probs:
            probs = jax.nn.one_hot(proposals, probs.shape[-1], dtype=probs.dtype)
    else:
        proposals = draw(probs, request_keys(state.sampling.seed, draft_at, Purpose.PROPOSE))
    has_drafts = jnp.any(matches, axis=1) & (state.finish == Finish.RUNNING)
    return state._replace(
        proposals=proposals,
        proposal_probs=probs,
        num_proposals=jnp.where(has_drafts, plan.num_masks, 0).astype(jnp.int32),
    )


def is_running(state: DecodeState) -> Array:
    """Scalar bool: some slot still decodes."""
    return jnp.any(state.finish == Finish.RUNNING)
