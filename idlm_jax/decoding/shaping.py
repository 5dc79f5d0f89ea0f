"""What a request wants of its logits before temperature and filters: biases, penalties, a floor, permitted ids.

All of it changes p, the distribution that ISD reproduces, so it stays exact: row j of p is shaped by what stands before
it, the drafts that it takes for granted included. q may be any distribution; shaped alike, it is refused less often.

The order is vLLM's: bias, repetition penalty, frequency and presence penalty, permitted ids, min_p.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from idlm_jax.decoding.sampling import SamplingParams


class Wishes(NamedTuple):
    """What `SamplingParams` ask for, as arrays: a mixed batch is one program."""

    min_p: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    first_stop: Int[Array, " B"]  # first position at which a stop id may stand


class Shaping(NamedTuple):
    """Wishes, and what they refer to."""

    wishes: Wishes
    bias: Float[Array, "B V"]
    in_prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]  # of committed tokens


def shaping_of(
    params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], slots: int, vocab_size: int
) -> Shaping | None:
    """The shaping of a batch before its prefill; None if nobody wants any.

    Args:
        params: of each request.
        prompts: their tokens.
        slots: rows of the batch; those behind the requests want nothing.
        vocab_size: V.

    Raises:
        ValueError: a bias names an id outside the vocabulary.
    """
    if not any(each.is_shaped for each in params):
        return None
    bias = np.zeros((slots, vocab_size), np.float32)
    in_prompt = np.zeros((slots, vocab_size), np.bool_)
    for slot, (wanted, prompt) in enumerate(zip(params, prompts, strict=True)):
        check_bias(wanted, vocab_size)
        for token, value in wanted.logit_bias:
            bias[slot, token] += value
        in_prompt[slot, list(prompt)] = True
    neutral = [SamplingParams()] * (slots - len(params))
    wishes = Wishes(
        *(
            jnp.asarray([getattr(each, name) for each in (*params, *neutral)], jnp.float32)
            for name in Wishes._fields[:-1]
        ),
        first_stop=jnp.asarray(
            [len(prompt) + each.min_tokens for prompt, each in zip(prompts, params, strict=True)] + [0] * len(neutral),
            jnp.int32,
        ),
    )
    return Shaping(wishes, jnp.asarray(bias), jnp.asarray(in_prompt), jnp.zeros((slots, vocab_size), jnp.int32))


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError if a bias names an id outside the vocabulary."""
    outside = [token for token, _ in params.logit_bias if token >= vocab_size]
    if outside:
        raise ValueError(f"logit_bias names ids {outside[:5]} outside the vocabulary of {vocab_size}")


def empty_shaping(slots: int, vocab_size: int) -> Shaping:
    """Nobody wants anything."""
    zeros = jnp.zeros(slots)
    return Shaping(
        Wishes(zeros, zeros, zeros, jnp.ones(slots), jnp.zeros(slots, jnp.int32)),
        bias=jnp.zeros((slots, vocab_size)),
        in_prompt=jnp.zeros((slots, vocab_size), jnp.bool_),
        counts=jnp.zeros((slots, vocab_size), jnp.int32),
    )


def shape(
    logits: Float[Array, "B C V"],
    shaping: Shaping,
    drafts: Int[Array, "B P"],
    first_position: Int[Array, " B"],
    stop_ids: Int[Array, "B E"],
    temperature: Float[Array, " B"],
    allowed: UInt[Array, "B C words"] | None,
) -> Float[Array, "B C V"]:
    """The logits that temperature and filters then act on; float32, with -inf for what may not stand.

    Args:
        logits: raw scores.
        shaping: of each request.
        drafts: row j comes behind the first j of them; none for rows that all stand behind the committed tokens alone.
        first_position: of the token that row 0 predicts; row j predicts the j-th after it.
        stop_ids: padded with -1.
        temperature: min_p is a share of the likeliest token's probability at it.
        allowed: bit v % 32 of word v // 32 permits id v in that row; None permits all.
    """
    wishes = shaping.wishes
    depth = jnp.arange(logits.shape[1], dtype=jnp.int32)
    ids = jnp.arange(logits.shape[2], dtype=jnp.int32)
    counts = shaping.counts[:, None]
    for place in range(drafts.shape[1]):  # at most 15, and all of them one fused pass
        is_behind = (depth > place)[None, :, None]
        counts = counts + (is_behind & (drafts[:, place, None, None] == ids[None, None])).astype(jnp.int32)

    def column(values: Float[Array, " B"]) -> Float[Array, "B 1 1"]:
        return values[:, None, None]

    x = logits.astype(jnp.float32) + shaping.bias[:, None]
    is_seen = shaping.in_prompt[:, None] | (counts > 0)
    repetition = column(wishes.repetition_penalty)
    x = jnp.where(is_seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = x - column(wishes.frequency_penalty) * counts.astype(jnp.float32)
    x = x - jnp.where(counts > 0, column(wishes.presence_penalty), 0.0)

    position = first_position[:, None] + depth[None]
    is_early = position < wishes.first_stop[:, None]
    is_stop = jnp.any(stop_ids[:, :, None] == ids[None, None], axis=1)
    x = jnp.where(is_early[:, :, None] & is_stop[:, None], -jnp.inf, x)
    if allowed is not None:
        x = jnp.where(_bits(allowed, logits.shape[2]), x, -jnp.inf)

    # p / p_top = exp((x - top) / T); at T = 0 the likeliest alone is left anyway.
    min_p = column(wishes.min_p)
    floor = column(temperature) * jnp.log(jnp.where(min_p > 0, min_p, 1.0))
    is_below = x < jnp.max(x, axis=-1, keepdims=True) + floor
    return jnp.where(is_below & (min_p > 0) & (column(temperature) > 0), -jnp.inf, x)


def count(shaping: Shaping, tokens: Int[Array, "B C"], num_tokens: Int[Array, " B"]) -> Shaping:
    """Takes note of the first `num_tokens` committed tokens."""
    depth = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return shaping._replace(counts=_scatter(shaping.counts, tokens, depth < num_tokens[:, None]))


def read_prompt(
    shaping: Shaping,
    tokens: Int[Array, "B R"],
    num_tokens: Int[Array, "B 1"],
    start: Int[Array, "B 1"],
    prompt_len: Int[Array, "B 1"],
) -> Shaping:
    """Takes note of a stretch of a request, of which a first stretch forgets what was there before.

    Args:
        shaping: of each request.
        tokens: the stretches, padded.
        num_tokens: tokens of each that count.
        start: position of each one's first token.
        prompt_len: tokens behind that position were generated, and are read again.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    is_token, is_prompt = index < num_tokens, start + index < prompt_len
    kept = start > 0
    in_prompt = _scatter((shaping.in_prompt & kept).astype(jnp.int32), tokens, is_token & is_prompt) > 0
    counts = _scatter(jnp.where(kept, shaping.counts, 0), tokens, is_token & ~is_prompt)
    return shaping._replace(in_prompt=in_prompt, counts=counts)


def _scatter(counts: Int[Array, "B V"], tokens: Int[Array, "B C"], is_counted: Bool[Array, "B C"]) -> Int[Array, "B V"]:
    row = jnp.broadcast_to(jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None], tokens.shape)
    # One past the end is dropped.
    return counts.at[row, jnp.where(is_counted, tokens, counts.shape[1])].add(1, mode="drop")


def _bits(words: UInt[Array, "B C words"], num_bits: int) -> Bool[Array, "B C V"]:
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, None]
    bits = jax.lax.shift_right_logical(words[..., None], jnp.broadcast_to(shifts, (*words.shape, 32))) & jnp.uint32(1)
    return bits.reshape(*words.shape[:2], -1)[:, :, :num_bits] != 0
