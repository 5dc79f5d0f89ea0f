"""One forward of a running batch: verify the drafts, commit what survives, draft anew. Also the prefill.

Both end in the same `_commit_and_draft`; a prefill is a forward whose clean rows are the prompt and which has nothing
to verify. Every function here is pure and traced; the compiled entry points live in `loop.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from idlm_jax.decoding import fixed_width
from idlm_jax.decoding.block_diffusion import denoise, prefill_block
from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.over_mesh import on_every_device, whole_logits
from idlm_jax.decoding.placement import rows_of
from idlm_jax.decoding.record import how_many, logprobs_of, record
from idlm_jax.decoding.shaping import count, shape
from idlm_jax.decoding.state import Committed, Counts, DecodeState, Finish, narrowed, widened
from idlm_jax.decoding.window import Outputs, Rows, Window, build_window
from idlm_jax.model.attention import paged_attend
from idlm_jax.model.kv_cache import KVCache
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.verify import Purpose, RowStats, Verdict, draft, verify, verify_coupled


def prefill(module: Qwen3, plan: StepPlan, state: DecodeState, num_rows: int) -> DecodeState:
    """Reads the prompts, commits each one's first token and drafts behind it, so no decode step starts cold.

    Args:
        module: the model.
        plan: static description of the step.
        state: fresh from `initial_state`.
        num_rows: static length of the padded prompts.
    """
    if plan.group_slots is not None:  # a tile writes further, and reads no further than it must
        start = jnp.zeros_like(state.context_len)
        return record(*prefill_chunk(module, plan, state, state.tokens[:, :num_rows], start))
    page_table = state.page_table
    behind = plan.num_masks if plan.block is None else plan.written_rows
    num_pages = -(-(num_rows + behind) // state.cache.page_size)  # nothing stands behind these yet
    start = jnp.zeros_like(state.context_len)
    state, committed = prefill_chunk(
        module, plan, state._replace(page_table=page_table[:, :num_pages]), state.tokens[:, :num_rows], start
    )
    return record(state._replace(page_table=page_table), committed)


def prefill_chunk(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    tokens: Int[Array, "B R"],
    start: Int[Array, " B"],
    *,
    known: Int[Array, " B"] | None = None,
    allowed: UInt[Array, "B 1 words"] | None = None,
) -> tuple[DecodeState, Committed]:
    """Reads stretches of prompts, each behind what is already in its pages; a running slot's stretch ends its prompt.

    The last token of a stretch stands at `context_len`. Every stretch is followed by its MASKs at once, so strict
    causality is all the attention there is; what follows them is padding that nobody sees, in slots that the next
    forward overwrites. A running slot commits its first token and drafts; for a slot that does not run the stretch is
    only written to its pages. The state may have room for more drafts than the plan makes, as in `decode_window`.

    Args:
        module: the model.
        plan: static description of the step.
        state: `context_len` and `finish` say where each stretch ends and whether the prompt does.
        tokens: padded stretches.
        start: position of each one's first token.
        known: the token to commit, where it was drawn before; -1 draws one.
        allowed: as in `shape`, for the first token.
    """
    if plan.block is not None:
        return prefill_block(module, plan, state, tokens, start)
    step = functools.partial(_prefill_chunk, module, plan)
    if plan.group_slots is None:
        return step(state, tokens, start, known, allowed)
    every = jnp.ones_like(start, bool)
    return fixed_width.over_groups(step, plan, state, every, tokens, start, known, allowed)


def _prefill_chunk(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    tokens: Int[Array, "B R"],
    start: Int[Array, " B"],
    known: Int[Array, " B"] | None,
    allowed: UInt[Array, "B 1 words"] | None,
) -> tuple[DecodeState, Committed]:
    read = _prefill_at_once if plan.group_slots is None else _prefill_by_tiles
    after, committed = read(module, plan, narrowed(state, plan.num_masks), tokens, start, known, allowed)
    return widened(after, state), committed


def _prefill_at_once(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    tokens: Int[Array, "B R"],
    start: Int[Array, " B"],
    known: Int[Array, " B"] | None,
    allowed: UInt[Array, "B 1 words"] | None,
) -> tuple[DecodeState, Committed]:
    num_tokens = (state.context_len + 1 - start)[:, None]
    index = jnp.arange(tokens.shape[1] + plan.num_masks, dtype=jnp.int32)[None]
    is_mask = (index >= num_tokens) & (index < num_tokens + plan.num_masks)
    padded = jnp.pad(tokens, ((0, 0), (0, plan.num_masks)))
    hidden, cache = module.hidden_states(
        jnp.where(is_mask, plan.mask_token_id, padded),
        start[:, None] + index,
        paged_attend(state.page_table, start, None, module.config.kernels, plan.mesh),
        carried=state.cache,
        lora_gate=is_mask,
    )
    rows = _prompt_end(plan, len(start))
    used = jnp.take_along_axis(hidden, (num_tokens - 1 + rows.depth)[..., None], axis=1)
    state, outputs = state._replace(cache=cache), Outputs(used, whole_logits(module.logits(used), plan))
    return _commit_and_draft(module, plan, state, outputs, rows, num_anchors=1, known=known, allowed=allowed)


def _prefill_by_tiles(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    tokens: Int[Array, "B R"],
    start: Int[Array, " B"],
    known: Int[Array, " B"] | None,
    allowed: UInt[Array, "B 1 words"] | None,
) -> tuple[DecodeState, Committed]:
    """`prefill_chunk` of one group: the stretch but for its last token, then that token as a window without drafts."""
    state = fixed_width.write_prompt(module, plan, state, tokens, start)
    last = jnp.take_along_axis(tokens, (state.context_len - start)[:, None], axis=1)
    rows = _prompt_end(plan, len(start))
    window = build_window(last, jnp.ones_like(start), state.context_len, rows, plan.mask_token_id)
    outputs, cache = fixed_width.window_outputs(module, plan, state, window)
    state = state._replace(cache=cache)
    return _commit_and_draft(module, plan, state, outputs, rows, num_anchors=1, known=known, allowed=allowed)


def _prompt_end(plan: StepPlan, batch: int) -> Rows:
    """The last prompt token, which has no draft to verify, and the MASKs behind it."""
    depth = jnp.broadcast_to(jnp.arange(plan.num_masks + 1, dtype=jnp.int32)[None], (batch, plan.num_masks + 1))
    return Rows(jnp.zeros_like(depth), depth)


def decode_step(module: Qwen3, plan: StepPlan, state: DecodeState) -> DecodeState:
    """One forward for every running slot; finished slots are computed along and left as they are."""
    return record(*decode_window(module, plan, state))


def decode_window(
    module: Qwen3, plan: StepPlan, state: DecodeState, allowed: UInt[Array, "B C words"] | None = None
) -> tuple[DecodeState, Committed]:
    """`decode_step` for an owner that keeps the committed tokens itself; `allowed` as in `shape`, for the anchors.

    The state may have room for more drafts than the plan verifies and makes: the rest is ignored.
    """
    if plan.block is not None:
        return denoise(module, plan, state)
    step = functools.partial(_decode_window, module, plan)
    if plan.group_slots is None:
        return step(state, allowed)
    return fixed_width.over_groups(step, plan, state, fixed_width.is_due(state), allowed)


def _decode_window(
    module: Qwen3, plan: StepPlan, state: DecodeState, allowed: UInt[Array, "B C words"] | None
) -> tuple[DecodeState, Committed]:
    forward = _verify_or_draft if plan.two_pass else _verify_and_draft
    after, committed = forward(module, plan, narrowed(state, plan.num_masks), allowed)
    return widened(after, state), committed


def _verify_and_draft(
    module: Qwen3, plan: StepPlan, state: DecodeState, allowed: UInt[Array, "B C words"] | None
) -> tuple[DecodeState, Committed]:
    """`decode_window` for a state with room for as many drafts as the plan makes."""
    rows = rows_of(plan, state)
    clean = jnp.concatenate([state.pending[:, None], state.proposals], axis=1)
    window = build_window(clean, state.num_proposals + 1, state.context_len, rows, plan.mask_token_id)
    outputs, cache = _window_outputs(module, plan, state, window)
    state, num_anchors = state._replace(cache=cache), plan.num_masks + 1
    return _commit_and_draft(module, plan, state, outputs, rows, num_anchors=num_anchors, allowed=allowed)


def _verify_or_draft(
    module: Qwen3, plan: StepPlan, state: DecodeState, allowed: UInt[Array, "B C words"] | None
) -> tuple[DecodeState, Committed]:
    """A forward of `TwoPass`: with drafts to verify it makes none, without any it commits a token and drafts."""
    drafts = state.num_proposals == 0
    behind = jnp.where(drafts[:, None], plan.mask_token_id, state.proposals)
    clean = jnp.concatenate([state.pending[:, None], behind], axis=1)
    row = jnp.broadcast_to(jnp.arange(plan.window_len, dtype=jnp.int32)[None], clean.shape)
    every = jnp.full_like(state.pending, plan.window_len)
    window = build_window(clean, every, state.context_len, Rows(row, jnp.zeros_like(row)), plan.mask_token_id)
    is_mask = drafts[:, None] & (row > 0)
    outputs, cache = _window_outputs(module, plan, state, window._replace(is_mask=is_mask))
    rows = Rows(jnp.where(is_mask, 0, row), jnp.where(is_mask, row, 0))
    state, num_anchors = state._replace(cache=cache), plan.window_len
    return _commit_and_draft(module, plan, state, outputs, rows, num_anchors=num_anchors, allowed=allowed)


def _window_outputs(module: Qwen3, plan: StepPlan, state: DecodeState, window: Window) -> tuple[Outputs, KVCache]:
    if plan.group_slots is not None:
        return fixed_width.window_outputs(module, plan, state, window)
    hidden, cache = module.hidden_states(
        window.tokens,
        window.positions,
        # MASK and rejected rows are written too; `context_len` will not cover them.
        paged_attend(state.page_table, state.context_len, window.visible, module.config.kernels, plan.mesh),
        carried=state.cache,
        lora_gate=window.is_mask,
    )
    # One product for all rows: the head is read once.
    return Outputs(hidden, whole_logits(module.logits(hidden), plan)), cache


def _commit_and_draft(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    outputs: Outputs,
    rows: Rows,
    *,
    num_anchors: int,
    known: Int[Array, " B"] | None = None,
    allowed: UInt[Array, "B C words"] | None = None,
) -> tuple[DecodeState, Committed]:
    """Turns what the model says into committed tokens and new proposals.

    Args:
        module: the model, for its kernels.
        plan: static description of the step.
        state: with the cache already extended.
        outputs: of all rows.
        rows: what they are for.
        num_anchors: the first rows, which verify: the pending token and every draft there may be.
        known: as in `prefill_chunk`.
        allowed: as in `shape`, for the anchors; needs `state.shaping`.
    """
    num_checked = num_anchors - 1
    raw_logits = anchor_logits = outputs.logits[:, :num_anchors]
    drafts = state.proposals[:, :num_checked]
    if state.shaping is not None:
        where, temperature = state.context_len + 1, state.sampling.temperature
        anchor_logits = shape(raw_logits, state.shaping, drafts, where, state.stop_ids, temperature, allowed)
    has_logits = plan.keeps_proposal_logits and num_checked > 0
    op, of_drafts = verify_coupled, ()
    if not plan.coupled:
        op, of_drafts = verify, (state.proposal_logits, state.proposal_stats) if has_logits else (None, None)
    num_drafts = jnp.minimum(state.num_proposals, num_checked)
    verdict = on_every_device(op, module, plan)(
        anchor_logits, drafts, *of_drafts, num_drafts, state.sampling, state.context_len + 1
    )
    depths = jnp.arange(num_anchors, dtype=jnp.int32)[None]
    is_final = depths == verdict.accepted_len[:, None]
    next_token = verdict.next_token if known is None else jnp.where(known >= 0, known, verdict.next_token)
    candidates = jnp.where(is_final, next_token[:, None], jnp.pad(drafts, ((0, 0), (0, 1))))
    num_committed, finish = how_many(state, candidates, verdict.accepted_len)
    is_running = state.finish == Finish.RUNNING
    counts = _count(state, verdict, num_committed, is_running)
    last = jnp.take_along_axis(candidates, jnp.maximum(num_committed - 1, 0)[:, None], axis=1)[:, 0]
    state = state._replace(
        pending=jnp.where(num_committed > 0, last, state.pending),
        context_len=state.context_len + num_committed,
        finish=finish,
        counts=counts,
        shaping=None if state.shaping is None else count(state.shaping, candidates, num_committed),
    )
    checksums = None if plan.group_slots is None else fixed_width.checksums(raw_logits)
    committed = Committed(candidates, num_committed, logprobs_of(plan, raw_logits, candidates), checksums)
    return _draft(module, plan, state, outputs, rows, verdict.accepted_len), committed


def _count(state: DecodeState, verdict: Verdict, num_committed: Int[Array, " B"], is_running: Array) -> Counts:
    """Adds one forward. A draft counts as verified if its fate decided a committed token."""
    counts = state.counts
    num_checked = verdict.accept_probs.shape[1]
    if num_checked == 0:  # a prefill or AR
        return counts._replace(forwards=counts.forwards + is_running.astype(jnp.int32))
    depths = jnp.arange(num_checked)[None]
    is_verified = (
        (depths < state.num_proposals[:, None])
        & (depths <= verdict.accepted_len[:, None])
        & (depths < num_committed[:, None])
    )
    is_cold = is_running & (state.num_proposals == 0)
    is_accepted = is_verified & (depths < verdict.accepted_len[:, None])
    pad = ((0, 0), (0, counts.verified.shape[1] - num_checked))
    return Counts(
        forwards=counts.forwards + is_running.astype(jnp.int32),
        cold_starts=counts.cold_starts + is_cold.astype(jnp.int32),
        verified=counts.verified + jnp.pad(is_verified.astype(jnp.int32), pad),
        accepted=counts.accepted + jnp.pad(is_accepted.astype(jnp.int32), pad),
        accept_prob=counts.accept_prob + jnp.pad(jnp.where(is_verified, verdict.accept_probs, 0.0), pad),
    )


def _draft(
    module: Qwen3,
    plan: StepPlan,
    state: DecodeState,
    outputs: Outputs,
    rows: Rows,
    accepted_len: Int[Array, " B"],
) -> DecodeState:
    """Takes proposals from the MASKs that stand behind exactly the accepted drafts; none means a cold start."""
    if plan.num_masks == 0:
        return state
    depth = jnp.arange(1, plan.num_masks + 1, dtype=jnp.int32)[None, :, None]
    matches = (rows.depth[:, None] == depth) & (rows.prefix[:, None] == accepted_len[:, None, None])
    which = jnp.argmax(matches, axis=2)[..., None]
    masks = Outputs(*(jnp.take_along_axis(each, which, axis=1) for each in outputs))
    if module.config.markov_rank is None:
        proposals, stats, chosen = _propose(module, plan, state, masks.logits, 0)
    else:
        proposals, stats, chosen = _propose_in_turn(module, plan, state, masks)
    if plan.keeps_proposal_logits:
        state = state._replace(proposal_logits=chosen)
    if state.confidence is not None:
        is_mask_id = jnp.arange(chosen.shape[2])[None, None] == plan.mask_token_id
        probs = jax.nn.softmax(jnp.where(is_mask_id, -jnp.inf, chosen), axis=-1)
        state = state._replace(confidence=jnp.take_along_axis(probs, proposals[..., None], axis=-1)[..., 0])
    if state.proposal_stats is not None:
        # Also in a step of greedy requests alone: in a later step that draws for others, these are their point masses.
        state = state._replace(proposal_stats=stats)
    num_drafts = jnp.sum(jnp.any(matches, axis=2), axis=1, dtype=jnp.int32)
    is_running = state.finish == Finish.RUNNING
    return state._replace(proposals=proposals, num_proposals=jnp.where(is_running, num_drafts, 0))


def _propose(
    module: Qwen3, plan: StepPlan, state: DecodeState, logits: Float[Array, "B C V"], depth: int
) -> tuple[Int[Array, "B C"], RowStats, Float[Array, "B C V"]]:
    """Drafts from MASKs `depth` and on of a group: the tokens, and what they were drawn from."""
    # MASK k behind the accepted drafts predicts the token k places after the one just committed.
    where = state.context_len + 1 + depth
    if state.shaping is not None:
        behind = jnp.zeros((len(where), 0), jnp.int32)
        logits = shape(logits, state.shaping, behind, where, state.stop_ids, state.sampling.temperature, None)
    purpose = Purpose.COMMIT if plan.coupled else Purpose.PROPOSE
    op = on_every_device(draft, module, plan, argmax=plan.argmax_proposals, purpose=purpose)
    return *op(logits, state.sampling, where), logits


def _propose_in_turn(
    module: Qwen3, plan: StepPlan, state: DecodeState, masks: Outputs
) -> tuple[Int[Array, "B M"], RowStats, Float[Array, "B M V"]]:
    """`_propose` with a Markov head: each MASK is told the draft before it, the first one the token just committed."""
    before, drafted = state.pending[:, None], []
    for depth in range(plan.num_masks):
        row = slice(depth, depth + 1)
        correction = module.markov.logits(module.markov_features(masks.hidden[:, row], before))
        logits = masks.logits[:, row] + whole_logits(correction, plan)
        drafted.append(_propose(module, plan, state, logits, depth))
        before = drafted[-1][0]
    return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), *drafted)


def is_running(state: DecodeState) -> Array:
    """Scalar bool: some slot still decodes."""
    return jnp.any(state.finish == Finish.RUNNING)
