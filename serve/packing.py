"""How a step travels: one int32 array to the device per program, one back. Both ends of each layout stand together."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.decoding.generate import TokenLogprob
from idlm_jax.decoding.method import TILE_ROWS
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.shaping import Wishes
from idlm_jax.decoding.state import Committed, DecodeState
from pallas_kernels.verify import Sampling
from serve.requests import Chunk, Limits, Window

# Words of a prefill row before its stop ids, page table and tokens.
_PLACE = 6  # slot, start, number of tokens, whether it commits or is restored, restored token or -1, has drafts
# end, prompt length, first position of a stop id, top_k, seed; then floats: temperature, top_p, and four wishes.
_INTS, _FLOATS = 5, 6
_SAMPLING = _INTS + _FLOATS


class Layout(NamedTuple):
    """Sizes that both ends agree on."""

    num_masks: int
    num_stop_ids: int
    table_width: int  # pages that a request's table has room for
    max_new_pages: int  # that one window may add to it
    idle_slot: int  # where the rows of a batch live that nobody uses
    num_biases: int  # of one request
    has_checksums: bool  # of the logits behind each token: the bit-for-bit mode


def layout_of(limits: Limits, num_stop_ids: int, num_biases: int, *, is_bitwise: bool = False) -> Layout:
    """The layout for a scheduler with these limits."""
    num_masks = limits.stride - 1
    # A padded chunk may start at the last token of the longest prompt, and is written to some page all the same.
    last_slot = limits.max_len + max(rows for _, rows in limits.prefill_shapes) + limits.window_len
    if is_bitwise:  # the chunk's last tile, and a window's, are written whole
        last_slot += 2 * TILE_ROWS
    return Layout(
        num_masks=num_masks,
        num_stop_ids=num_stop_ids,
        table_width=-(-last_slot // limits.page_size),
        # What two forwards may commit, and a long window behind a short one.
        max_new_pages=-(-(2 * limits.stride + limits.window_len) // limits.page_size) + 1,
        idle_slot=limits.num_slots,
        num_biases=num_biases,
        has_checksums=is_bitwise,
    )


def decode_words(layout: Layout) -> int:
    """Width of a decode row."""
    return 2 + layout.max_new_pages + 1 + layout.num_masks


def prefill_words(layout: Layout, rows: int) -> int:
    """Width of a prefill row with `rows` tokens."""
    return _PLACE + fixed_words(layout) + layout.table_width + rows


def fixed_words(layout: Layout) -> int:
    """How much of a prefill row a request never changes."""
    return _SAMPLING + layout.num_stop_ids + 2 * layout.num_biases


def sampling_words(
    layout: Layout, params: SamplingParams, prompt_len: int, end: int, stop_ids: Sequence[int]
) -> np.ndarray:
    """The part of a prefill row that a request never changes."""
    words = np.full(fixed_words(layout), -1, np.int32)
    words[: _INTS - 1] = end, prompt_len, prompt_len + params.min_tokens, params.top_k
    words[_INTS - 1 : _INTS].view(np.uint32)[0] = params.seed
    words[_INTS:_SAMPLING].view(np.float32)[:] = (
        params.temperature, params.top_p,
        params.min_p, params.presence_penalty, params.frequency_penalty, params.repetition_penalty,
    )  # fmt: skip
    words[_SAMPLING : _SAMPLING + len(stop_ids)] = stop_ids
    at_biases = _SAMPLING + layout.num_stop_ids
    ids, biases = np.split(words[at_biases:], 2)
    for place, (token, bias) in enumerate(params.logit_bias):
        ids[place], biases.view(np.float32)[place] = token, bias
    return words


def pack_windows(
    layout: Layout, windows: Sequence[Window], drafts: Sequence[Sequence[int] | None], batch: int
) -> np.ndarray:
    """[batch, words]: slot, place of its first new page, new pages, and drafts in place of those drawn unless None."""
    words = np.zeros((batch, decode_words(layout)), np.int32)
    at_drafts = 2 + layout.max_new_pages
    words[:, at_drafts] = -1
    words[:, 0] = layout.idle_slot
    words[:, 1] = layout.table_width  # behind the table: nothing is written
    for row, (window, given) in enumerate(zip(windows, drafts, strict=True)):
        words[row, 0] = window.request.slot
        if window.new_pages:
            words[row, 1] = window.first_new_page
            words[row, 2 : 2 + len(window.new_pages)] = window.new_pages
        if given is not None:
            words[row, at_drafts] = len(given)
            words[row, at_drafts + 1 : at_drafts + 1 + len(given)] = given
    return words


class Windows(NamedTuple):
    """A decode array on the device."""

    slot: Int[Array, " B"]
    place: Int[Array, "B P"]
    page: Int[Array, "B P"]
    num_drafts: Int[Array, " B"]  # -1: as drawn
    drafts: Int[Array, "B M"]


def unpack_windows(layout: Layout, words: Int[Array, "B words"]) -> Windows:
    """The inverse of `pack_windows`; places without a page name the sink, or lie behind the table."""
    at_drafts = 2 + layout.max_new_pages
    pages = words[:, 2:at_drafts]
    place = words[:, 1:2] + jnp.arange(pages.shape[1], dtype=jnp.int32)[None]
    return Windows(words[:, 0], place, pages, words[:, at_drafts], words[:, at_drafts + 1 :])


def pack_chunks(
    layout: Layout, chunks: Sequence[Chunk], sampling: Sequence[np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """[requests, words]; rows without a chunk read one token into the sink."""
    words = np.zeros((shape[0], prefill_words(layout, shape[1])), np.int32)
    words[:, :_PLACE] = layout.idle_slot, 0, 1, 0, -1, 0
    at_table = _PLACE + fixed_words(layout)
    words[:, _PLACE:at_table] = sampling_words(layout, SamplingParams(), 0, 0, ())
    at_tokens = at_table + layout.table_width
    for row, (chunk, fixed) in enumerate(zip(chunks, sampling, strict=True)):
        request = chunk.request
        restored = -1 if chunk.restored is None else chunk.restored
        words[row, :_PLACE] = (
            request.slot, chunk.start, chunk.num_tokens, chunk.is_last, restored, request.num_drafts,
        )  # fmt: skip
        words[row, _PLACE:at_table] = fixed
        words[row, at_table : at_table + len(request.pages)] = request.pages
        tokens = request.tokens[chunk.start : chunk.start + chunk.num_tokens]
        words[row, at_tokens : at_tokens + len(tokens)] = tokens
    return words


class Prompts(NamedTuple):
    """A prefill array on the device."""

    slot: Int[Array, " B"]
    start: Int[Array, " B"]
    num_tokens: Int[Array, " B"]
    is_last: Bool[Array, " B"]
    restored: Int[Array, " B"]
    num_drafts: Int[Array, " B"]  # of a restored request
    end: Int[Array, " B"]
    prompt_len: Int[Array, " B"]
    sampling: Sampling
    wishes: Wishes
    stop_ids: Int[Array, "B E"]
    bias_ids: Int[Array, "B K"]  # -1: none
    biases: Float[Array, "B K"]
    page_table: Int[Array, "B pages"]
    tokens: Int[Array, "B R"]


def unpack_chunks(layout: Layout, words: Int[Array, "B words"]) -> Prompts:
    """The inverse of `pack_chunks`."""
    at_floats = _PLACE + _INTS
    at_stops = at_floats + _FLOATS
    at_biases = at_stops + layout.num_stop_ids
    at_table = _PLACE + fixed_words(layout)
    at_tokens = at_table + layout.table_width
    slot, start, num_tokens, is_last, restored, num_drafts, end, prompt_len, first_stop, top_k, seed = (
        words[:, column] for column in range(at_floats)
    )
    floats = jax.lax.bitcast_convert_type(words[:, at_floats:at_stops], jnp.float32)
    temperature, top_p, *wishes = (floats[:, column] for column in range(_FLOATS))
    bias_ids, biases = jnp.split(words[:, at_biases:at_table], 2, axis=1)
    return Prompts(
        slot, start, num_tokens, is_last != 0, restored, num_drafts, end, prompt_len,
        sampling=Sampling(temperature, top_k, top_p, seed=jax.lax.bitcast_convert_type(seed, jnp.uint32)),
        wishes=Wishes(*wishes, first_stop=first_stop),
        stop_ids=words[:, at_stops:at_biases],
        bias_ids=bias_ids,
        biases=jax.lax.bitcast_convert_type(biases, jnp.float32),
        page_table=words[:, at_table:at_tokens],
        tokens=words[:, at_tokens:],
    )  # fmt: skip


def pack_outcome(state: DecodeState, committed: Committed) -> Int[Array, "B words"]:
    """What the host wants to know of a forward: its tokens, whether that was the end, and the request's statistics."""
    counts = state.counts
    columns = [committed.num_tokens, state.finish, state.num_proposals, counts.forwards, counts.cold_starts]
    probs = jax.lax.bitcast_convert_type(counts.accept_prob, jnp.int32)
    words = [jnp.stack(columns, axis=1), counts.verified, counts.accepted, probs, state.proposals, committed.tokens]
    if committed.checksums is not None:
        words.append(jax.lax.bitcast_convert_type(committed.checksums, jnp.int32))
    if committed.logprobs is not None:
        batch = committed.tokens.shape[0]
        chosen, top_ids, top = committed.logprobs
        words += [
            jax.lax.bitcast_convert_type(chosen, jnp.int32),
            top_ids.reshape(batch, -1),
            jax.lax.bitcast_convert_type(top, jnp.int32).reshape(batch, -1),
        ]
    return jnp.concatenate(words, axis=1)


@dataclasses.dataclass(frozen=True)
class Tally:
    """Statistics as in `idlm_jax.decoding.state.Counts`, of one request or of many."""

    forwards: int
    cold_starts: int
    verified: np.ndarray  # by depth, like the next two
    accepted: np.ndarray
    accept_prob: np.ndarray

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.forwards + other.forwards,
            self.cold_starts + other.cold_starts,
            self.verified + other.verified,
            self.accepted + other.accepted,
            self.accept_prob + other.accept_prob,
        )


def no_tally(num_masks: int) -> Tally:
    """The tally of no forward."""
    zeros = np.zeros(num_masks, np.int64)
    return Tally(0, 0, zeros, zeros, np.zeros(num_masks))


class Outcome(NamedTuple):
    """What one forward did to one request."""

    tokens: list[int]
    finish: int
    drafts: list[int]  # for the next forward to verify; none if it starts cold
    tally: Tally
    # Log-probabilities [C], ids [C, A] and log-probabilities [C, A] of alternatives; None if the program reports none.
    reported: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    checksums: list[int] | None  # of the tokens' logits; bit-for-bit mode only


def unpack_logprobs(outcome: Outcome, num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens, each with its `num_top` likeliest alternatives."""
    assert outcome.reported is not None
    chosen, top_ids, top = outcome.reported
    return [
        TokenLogprob(token, float(logprob), dict(zip(ids.tolist(), values.tolist(), strict=True)))
        for token, logprob, ids, values in zip(
            outcome.tokens, chosen, top_ids[:, :num_top], top[:, :num_top], strict=False
        )
    ]


def unpack_outcome(layout: Layout, words: np.ndarray, num_rows: int) -> list[Outcome]:
    """The inverse of `pack_outcome`, on the host.

    Args:
        layout: as everywhere.
        words: [B, words].
        num_rows: tokens that a request may have committed, C.
    """
    masks = layout.num_masks
    at_drafts = 5 + 3 * masks
    at_tokens = at_drafts + masks
    at_sums = at_tokens + num_rows
    end = at_sums + num_rows * layout.has_checksums
    num_top = (words.shape[1] - end) // num_rows // 2  # one column for the chosen, two for every alternative
    is_reported = words.shape[1] > end
    probs = words[:, 5 + 2 * masks : at_drafts].view(np.float32)
    outcomes = []
    for row, prob, ints in zip(words, probs, words[:, :end].tolist(), strict=True):
        num_tokens, finish, num_proposals, forwards, cold_starts = ints[:5]
        tally = Tally(forwards, cold_starts, row[5 : 5 + masks], row[5 + masks : 5 + 2 * masks], prob)
        reported = None
        if is_reported:
            chosen, top_ids, top = np.split(row[end:], [num_rows, num_rows * (1 + num_top)])
            shape = num_rows, num_top
            reported = chosen.view(np.float32), top_ids.reshape(shape), top.view(np.float32).reshape(shape)
        tokens = ints[at_tokens : at_tokens + num_tokens]
        sums = row[at_sums : at_sums + num_tokens].view(np.uint32).tolist() if layout.has_checksums else None
        drafts = ints[at_drafts : at_drafts + num_proposals]
        outcomes.append(Outcome(tokens, finish, drafts, tally, reported, sums))
    return outcomes
