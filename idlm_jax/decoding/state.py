"""Everything a running batch carries from one forward to the next: one pytree, leading axis = slot."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from idlm_jax.config import ModelConfig
from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.shaping import Shaping
from idlm_jax.model.kv_cache import PAGE_SIZE, KVCache, contiguous_pages, empty_cache
from pallas_kernels.verify import RowStats, Sampling


class Finish(enum.IntEnum):
    """Why a slot no longer decodes."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2


class Counts(NamedTuple):
    """Statistics of each request; depth 0 is the first draft after the bonus."""

    forwards: Int[Array, " B"]
    cold_starts: Int[Array, " B"]  # decode forwards that had nothing to verify
    verified: Int[Array, "B M"]  # drafts whose fate decided a committed token, by depth
    accepted: Int[Array, "B M"]
    accept_prob: Float[Array, "B M"]  # sum of min(1, p/q) over the verified


class Logprobs(NamedTuple):
    """Log-probabilities of tokens under the causal distribution, before temperature and filters."""

    chosen: Float[Array, "B S"]
    top_ids: Int[Array, "B S A"]  # A likeliest alternatives
    top: Float[Array, "B S A"]


class Committed(NamedTuple):
    """What one forward added to each request."""

    tokens: Int[Array, "B C"]  # only the first `num_tokens` count
    num_tokens: Int[Array, " B"]  # 0 for a slot that does not run
    logprobs: Logprobs | None  # of the C tokens; None if the plan reports none
    checksums: UInt[Array, "B C"] | None = None  # of the logits behind each token; bit-for-bit mode only


class Block(NamedTuple):
    """The block that block diffusion works on; it holds position `context_len + 1`."""

    tokens: Int[Array, "B L"]  # the MASK id where none is filled in yet
    num_steps: Int[Array, " B"]  # forwards over it so far
    num_edits: Int[Array, " B"]  # of those, over a full one


class DecodeState(NamedTuple):
    """A batch in flight. S is the capacity; positions are absolute and 0-based.

    The pending token of slot b stands at position `context_len[b]`: committed, its keys and values not yet written; by
    block diffusion they are, and `pending` is not used. Cache slots [0, context_len) belong to the request; anything
    behind is stale. Slots exist for every row that a forward may write, so the page table covers a window more than S.
    """

    tokens: Int[Array, "B S"]  # prompt and committed tokens; S = 0 for an owner that keeps them elsewhere
    logprobs: Logprobs | None  # at the positions of `tokens`; None if the plan reports none
    pending: Int[Array, " B"]
    context_len: Int[Array, " B"]
    end: Int[Array, " B"]  # first position that must stay empty: prompt length + max_tokens
    stop_ids: Int[Array, "B E"]  # padded with -1
    finish: Int[Array, " B"]
    proposals: Int[Array, "B M"]
    proposal_logits: Float[Array, "B M V"] | None  # what they were drawn from; None for point masses
    proposal_stats: RowStats | None
    confidence: Float[Array, "B M"] | None  # q of each proposal, if the plan places MASKs by it
    num_proposals: Int[Array, " B"]  # 0 means that the next forward is a cold start
    sampling: Sampling
    shaping: Shaping | None  # None where nobody wants anything of it
    counts: Counts
    page_table: Int[Array, "B pages"]
    cache: KVCache
    checksums: UInt[Array, "B S"] | None = None  # at the positions of `tokens`; bit-for-bit mode only
    block: Block | None = None  # block diffusion only


def narrowed(state: DecodeState, num_masks: int) -> DecodeState:
    """The state with room for the first `num_masks` drafts alone: what a plan of a smaller stride sees of it."""
    if state.proposals.shape[1] == num_masks:
        return state
    first = jax.tree.map(lambda drafts: drafts[:, :num_masks], _drafts(state))
    return _with_drafts(state, *first)._replace(num_proposals=jnp.minimum(state.num_proposals, num_masks))


def widened(state: DecodeState, wide: DecodeState) -> DecodeState:
    """The inverse of `narrowed`: drafts of `state` in the room of `wide`. What lies behind them is stale."""
    num_masks = state.proposals.shape[1]
    if wide.proposals.shape[1] == num_masks:
        return state
    drafts = jax.tree.map(lambda old, new: old.at[:, :num_masks].set(new), _drafts(wide), _drafts(state))
    return _with_drafts(state, *drafts)


def _drafts(state: DecodeState) -> tuple[Array, Array | None, RowStats | None, Array | None]:
    """The fields with an axis of drafts."""
    return state.proposals, state.proposal_logits, state.proposal_stats, state.confidence


def _with_drafts(
    state: DecodeState, proposals: Array, logits: Array | None, stats: RowStats | None, confidence: Array | None
) -> DecodeState:
    return state._replace(proposals=proposals, proposal_logits=logits, proposal_stats=stats, confidence=confidence)


def initial_state(
    config: ModelConfig,
    plan: StepPlan,
    tokens: Int[np.ndarray, "B S"],
    prompt_len: Int[np.ndarray, " B"],
    end: Int[np.ndarray, " B"],
    stop_ids: Int[np.ndarray, "B E"],
    sampling: Sampling,
    paging: tuple[Int[Array, "B pages"], KVCache] | None = None,
    shaping: Shaping | None = None,
    *,
    written_rows: int | None = None,
    keeps_confidence: bool = False,
) -> DecodeState:
    """A batch before its prefill: `context_len` points at the last prompt token, slots with no budget are done.

    Args:
        config: of the model.
        plan: of the forwards to come; of several, the one with the most drafts.
        tokens: the prompts, padded; none at all (S = 0) for an owner that feeds them chunk by chunk.
        prompt_len: tokens of each prompt.
        end: first position of each request that must stay empty.
        stop_ids: padded with -1.
        sampling: of each request.
        paging: page table and pool; by default a pool cut into one equal stretch per request.
        shaping: of each request, if any wants it.
        written_rows: most cache slots that any forward to come writes; those of `plan` by default.
        keeps_confidence: whether other plans than `plan` place MASKs.
    """
    batch, capacity = tokens.shape
    num_masks = plan.num_masks
    if paging is None:
        pages_per_request = -(
            -(capacity + (written_rows or plan.written_rows) - 1) // PAGE_SIZE
        )  # the last window starts inside the capacity
        paging = contiguous_pages(batch, pages_per_request), empty_cache(config, batch * pages_per_request)
    is_idle = jnp.asarray(end) <= jnp.asarray(prompt_len)

    def zeros(*shape: int, dtype: type = jnp.int32) -> Array:
        return jnp.zeros((batch, *shape), dtype)

    logprobs = proposal_logits = proposal_stats = None
    if plan.num_top_logprobs is not None:
        logprobs = Logprobs(
            zeros(capacity, dtype=jnp.float32),
            zeros(capacity, plan.num_top_logprobs),
            zeros(capacity, plan.num_top_logprobs, dtype=jnp.float32),
        )
    if plan.keeps_proposal_logits:
        proposal_logits = zeros(num_masks, config.vocab_size, dtype=jnp.float32)
        # Three arrays: a buffer can be donated once.
        columns = (zeros(num_masks, dtype=jnp.float32) for _ in range(3))
        proposal_stats = RowStats(zeros(num_masks), *columns)
    return DecodeState(
        tokens=jnp.asarray(tokens),
        logprobs=logprobs,
        pending=zeros(),  # the prefill commits the first
        context_len=jnp.asarray(prompt_len) - 1,
        end=jnp.asarray(end),
        stop_ids=jnp.asarray(stop_ids),
        finish=jnp.where(is_idle, jnp.int32(Finish.LENGTH), jnp.int32(Finish.RUNNING)),
        proposals=zeros(num_masks),
        proposal_logits=proposal_logits,
        proposal_stats=proposal_stats,
        confidence=zeros(num_masks, dtype=jnp.float32) if plan.places_masks or keeps_confidence else None,
        num_proposals=zeros(),
        sampling=sampling,
        shaping=shaping,
        counts=Counts(
            forwards=zeros(),
            cold_starts=zeros(),
            verified=zeros(num_masks),
            accepted=zeros(num_masks),
            accept_prob=zeros(num_masks, dtype=jnp.float32),
        ),
        page_table=paging[0],
        cache=paging[1],
        checksums=None if plan.group_slots is None else zeros(capacity, dtype=jnp.uint32),
        block=None if plan.block is None else Block(zeros(plan.block.block_length), zeros(), zeros()),
    )
