"""Forwards of block diffusion: fill the MASKs of a block that are surest, commit the block when it is full.

    a block    given by the prompt | filled, maybe edited | MASK ...
    sees       everything before the block, and all of the block

Its slots in the cache are written by every forward and count from the one that commits: `context_len` stands before the
block until then. Pure and traced; `step` comes here where the plan is block diffusion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.decoding.baselines import BlockDiffusion
from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.over_mesh import on_every_device, whole_logits
from idlm_jax.decoding.record import how_many
from idlm_jax.decoding.state import Block, Committed, DecodeState, Finish
from idlm_jax.model.attention import paged_block_attend
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.verify import Purpose, Sampling, draft

# Every forward over a block draws anew: its seed is the request's plus a multiple of this (2^32 / golden ratio).
NOISE_STRIDE = np.uint32(0x9E3779B9)


class Guess(NamedTuple):
    """What a forward would put at each place of the block, if it is to put anything."""

    drawn: Int[Array, "B L"]
    prob: Float[Array, "B L"]  # of `drawn`, after temperature and filters
    likeliest: Int[Array, "B L"]
    top_prob: Float[Array, "B L"]  # of `likeliest`, before them


def prefill_block(
    module: Qwen3, plan: StepPlan, state: DecodeState, tokens: Int[Array, "B R"], start: Int[Array, " B"]
) -> tuple[DecodeState, Committed]:
    """Reads stretches of prompts that start with a block, and lays out the block in which each prompt ends.

    Commits nothing. Tokens of an unfinished block are read again with it.

    Args:
        module: the model.
        plan: static description of the step.
        state: `context_len` is the position of each stretch's last token.
        tokens: padded stretches.
        start: position of each one's first token, a multiple of the block length.
    """
    how = _block_of(plan)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % how.block_length)))
    num_rows = tokens.shape[1]
    hidden, cache = module.hidden_states(
        tokens,
        start[:, None] + jnp.arange(num_rows, dtype=jnp.int32)[None],
        paged_block_attend(state.page_table, start, how.block_length, module.config.kernels, plan.mesh),
        carried=state.cache,
        lora_gate=jnp.zeros(tokens.shape, bool),
    )
    state = state._replace(cache=cache)
    first = _first_place(how, state)
    place = first[:, None] + jnp.arange(how.block_length, dtype=jnp.int32)[None]
    read = jnp.take_along_axis(tokens, jnp.clip(place - start[:, None], 0, num_rows - 1), axis=1)
    block = jnp.where(place <= state.context_len[:, None], read, plan.mask_token_id)
    if how.predicts_next:
        last = jnp.take_along_axis(hidden, (state.context_len - start)[:, None, None], axis=1)
        begun = _begin(module, plan, state, whole_logits(module.logits(last), plan))
        block = jnp.where((first > state.context_len)[:, None], begun, block)
    nothing = jnp.zeros_like(start)
    state = _count_forward(state._replace(block=Block(block, nothing, nothing), num_proposals=nothing))
    return state, Committed(jnp.zeros_like(start)[:, None], nothing, None)


def denoise(module: Qwen3, plan: StepPlan, state: DecodeState) -> tuple[DecodeState, Committed]:
    """One forward over the block of every slot: fills, edits, or commits it."""
    how, block = _block_of(plan), state.block
    assert block is not None
    length = how.block_length
    first = _first_place(how, state)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    is_masked = block.tokens == plan.mask_token_id
    hidden, cache = module.hidden_states(
        block.tokens,
        first[:, None] + index,
        paged_block_attend(state.page_table, first, length, module.config.kernels, plan.mesh),
        carried=state.cache,
        lora_gate=is_masked,
    )
    state = state._replace(cache=cache)
    logits = whole_logits(module.logits(hidden), plan)
    guess = _guess(module, plan, state, logits, first)

    fills = _fills(how, block, is_masked, guess)
    is_full = ~jnp.any(is_masked, axis=1)
    num_given = state.context_len + 1 - first
    edits = jnp.zeros_like(fills)
    if how.edit_threshold is not None:
        is_fixed = is_masked | (index < num_given[:, None]) | ((index == 0) & how.predicts_next)
        edits = ~is_fixed & (guess.likeliest != block.tokens) & (guess.top_prob > how.edit_threshold)
    num_edits = block.num_edits + is_full.astype(jnp.int32)
    is_done = is_full & (~jnp.any(edits, axis=1) | (num_edits > how.max_edits))
    tokens = jnp.where(fills, guess.drawn, jnp.where(edits, guess.likeliest, block.tokens))

    own = jnp.take_along_axis(block.tokens, jnp.minimum(num_given[:, None] + index, length - 1), axis=1)
    num_committed, finish = how_many(state, own, length - 1 - num_given)
    num_committed = jnp.where(is_done, num_committed, 0)
    state = _count_forward(state)._replace(
        context_len=state.context_len + num_committed, finish=jnp.where(is_done, finish, state.finish)
    )
    fresh = jnp.full_like(tokens, plan.mask_token_id)
    if how.predicts_next:
        fresh = _begin(module, plan, state, logits[:, -1:])
    block = Block(
        tokens=jnp.where(is_done[:, None], fresh, tokens),
        num_steps=jnp.where(is_done, 0, block.num_steps + 1),
        num_edits=jnp.where(is_done, 0, num_edits),
    )
    return state._replace(block=block), Committed(own, num_committed, None)


def _block_of(plan: StepPlan) -> BlockDiffusion:
    assert plan.block is not None
    return plan.block


def _count_forward(state: DecodeState) -> DecodeState:
    is_running = (state.finish == Finish.RUNNING).astype(jnp.int32)
    return state._replace(counts=state.counts._replace(forwards=state.counts.forwards + is_running))


def _first_place(how: BlockDiffusion, state: DecodeState) -> Int[Array, " B"]:
    """Where the block starts that the next token belongs to; the last one committed may be of the same."""
    return (state.context_len + 1) // how.block_length * how.block_length


def _guess(
    module: Qwen3, plan: StepPlan, state: DecodeState, logits: Float[Array, "B L V"], first: Int[Array, " B"]
) -> Guess:
    how, block = _block_of(plan), state.block
    assert block is not None
    sampling = state.sampling._replace(seed=state.sampling.seed + block.num_steps.astype(jnp.uint32) * NOISE_STRIDE)
    drawn, prob, likeliest, top_prob = _draw(module, plan, sampling, logits, first + int(how.predicts_next))
    if not how.predicts_next:
        return Guess(drawn, prob, likeliest, top_prob)
    # What row i says is about place i + 1; about place 0 none does.
    behind = [jnp.pad(each[:, :-1], ((0, 0), (1, 0))) for each in (drawn, prob, likeliest, top_prob)]
    return Guess(*behind)


def _draw(
    module: Qwen3, plan: StepPlan, sampling: Sampling, logits: Float[Array, "B L V"], first_position: Int[Array, " B"]
) -> Guess:
    """Draws a token from each row, with the noise that AR commits with at its place."""
    op = on_every_device(draft, module, plan, argmax=False, purpose=Purpose.COMMIT)
    drawn, stats = op(logits, sampling, first_position)
    is_mask_id = jnp.arange(logits.shape[2])[None, None] == plan.mask_token_id
    log_probs = jax.nn.log_softmax(jnp.where(is_mask_id, -jnp.inf, logits), axis=-1)
    top_prob = jnp.exp(jnp.max(log_probs, axis=-1))
    temperature = sampling.temperature[:, None]
    chosen = jnp.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
    prob = jnp.exp((chosen - stats.top_logit) / jnp.where(temperature > 0, temperature, 1.0)) / stats.mass
    return Guess(drawn, jnp.where(temperature > 0, prob, top_prob), stats.top_id, top_prob)


def _fills(how: BlockDiffusion, block: Block, is_masked: Bool[Array, "B L"], guess: Guess) -> Bool[Array, "B L"]:
    """Which MASKs are filled: all that are sure, or this forward's share of the surest."""
    confidence = jnp.where(is_masked, guess.prob, -1.0)
    share = jnp.array([how.share(step) for step in range(how.block_length)], jnp.int32)
    share = share[jnp.minimum(block.num_steps, how.block_length - 1)][:, None]
    # Places before this one in the order of confidence, the earlier first where it is the same.
    is_before = jnp.tril(jnp.ones((how.block_length, how.block_length), bool), k=-1)[None]
    ahead = confidence[:, None, :] > confidence[:, :, None]
    ahead |= (confidence[:, None, :] == confidence[:, :, None]) & is_before
    fills = is_masked & (jnp.sum(ahead, axis=2) < share)
    is_sure = is_masked & (confidence > how.threshold)
    return jnp.where(jnp.sum(is_sure, axis=1, keepdims=True) >= share, is_sure, fills)


def _begin(module: Qwen3, plan: StepPlan, state: DecodeState, last_logits: Float[Array, "B 1 V"]) -> Int[Array, "B L"]:
    """A new block whose first token the row before it has drawn, as AR would."""
    how = _block_of(plan)
    token = _draw(module, plan, state.sampling, last_logits, state.context_len + 1).drawn
    masks = jnp.full((len(token), how.block_length - 1), plan.mask_token_id, jnp.int32)
    return jnp.concatenate([token, masks], axis=1)
