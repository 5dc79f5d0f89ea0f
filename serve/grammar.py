"""Grammars that a completion must obey: llguidance says which ids may come next, also behind drafts. No JAX.

A grammar is a string that llguidance reads: Lark, or what its `LLMatcher.grammar_from_json_schema` and
`grammar_from_regex` return.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import fill_next_token_bitmask
from transformers import PreTrainedTokenizerBase


def mask_words(vocab_size: int) -> int:
    """Words of 32 ids that a mask over the vocabulary takes."""
    return -(-vocab_size // 32)


class Matcher:
    """One request's place in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]):
        self._matcher = matcher
        self._only_end = np.zeros(mask_words(vocab_size), np.uint32)
        for token in eos_token_ids:
            self._only_end[token // 32] |= np.uint32(1 << token % 32)

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes committed tokens.

        Raises:
            RuntimeError: they do not obey. That is a bug, for the masks allowed them.
        """
        for token in tokens:
            if self._matcher.is_stopped() and _permits(self._only_end, token):
                continue  # a text that cannot go on is complete before its end is said
            if not self._matcher.consume_token(token):
                raise RuntimeError(f"token {token} does not obey the grammar: {_first_line(self._matcher)}")

    def look_ahead(self, drafts: Sequence[int], num_masks: int) -> tuple[np.ndarray, list[int]]:
        """What may follow the committed tokens, and each draft after those before it.

        A place where only one id is possible gets that id for its draft, also where nothing was drawn: p is then a
        point mass on it, and accepts it whatever q was. Behind a draft that may not stand everything may: it will be
        refused.

        Args:
            drafts: as drawn; all of them or, before a cold start, none.
            num_masks: most drafts that a window verifies, M.

        Returns:
            Masks, uint32 [M + 1, words], where bit v % 32 of word v // 32 permits id v; and the drafts to verify.

        Raises:
            RuntimeError: the grammar has become too large to follow.
        """
        masks = np.full((num_masks + 1, len(self._only_end)), 0xFFFFFFFF, np.uint32)
        given, num_taken = list(drafts), 0
        for place in range(num_masks + 1):
            if self._matcher.is_stopped():
                masks[place] = self._only_end
            else:
                fill_next_token_bitmask(self._matcher, masks[place : place + 1].view(np.int32), 0)
            only = _only_id(masks[place]) if place < num_masks else None
            if only is not None:
                given[place : place + 1] = [only]
            # The mask is at hand: asking it is faster than asking the grammar again.
            if place >= len(given) or not _permits(masks[place], given[place]) or self._matcher.is_stopped():
                break
            self.advance(given[place : place + 1])
            num_taken += 1
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar cannot be followed: {_first_line(self._matcher)}")
        if num_taken and not self._matcher.rollback(num_taken):
            raise RuntimeError(f"the grammar cannot take drafts back: {_first_line(self._matcher)}")
        return masks, given


class Constraint:
    """A request's grammar: what its next forward must be told."""

    def __init__(self, matcher: Matcher, num_masks: int):
        """Args: a matcher at the start, and the drafts M that a window verifies."""
        self._matcher, self._num_masks = matcher, num_masks
        self.masks, self.drafts = matcher.look_ahead([], num_masks)

    def follow(self, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        """Takes what a forward committed and drafted.

        Raises:
            RuntimeError: as `Matcher`.
        """
        if tokens:
            self._matcher.advance(tokens)
        self.masks, self.drafts = self._matcher.look_ahead(drafts, self._num_masks)


class Grammars:
    """Compiles grammars for one vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Sequence[int]):
        """Takes about a second for 150,000 ids.

        Args:
            tokenizer: says what text an id is.
            vocab_size: of the model; ids behind the tokenizer's are never allowed.
            eos_token_ids: end a completion that its grammar allows to end.

        Raises:
            ValueError: nothing ends a completion.
        """
        if not eos_token_ids:
            raise ValueError("the model names no end-of-sequence id, by which a text under a grammar could end")
        self._vocab_size, self._eos_token_ids = vocab_size, tuple(eos_token_ids)
        fast: Any = tokenizer  # llguidance refuses others itself
        self._tokenizer = from_tokenizer(fast, n_vocab=vocab_size, eos_token=list(eos_token_ids))

    def matcher(self, grammar: str) -> Matcher:
        """A new request's place, at the start.

        Raises:
            ValueError: the grammar is malformed, or too large.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the grammar cannot be used: {_first_line(matcher)}")
        return Matcher(matcher, self._vocab_size, self._eos_token_ids)


def _first_line(matcher: LLMatcher) -> str:
    # The rest is the state of the parser, the grammar included.
    return (matcher.get_error().strip() or "no reason given").splitlines()[0]


def _permits(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token // 32] >> np.uint32(token % 32) & 1)


def _only_id(mask: np.ndarray) -> int | None:
    """The id that a mask permits if it permits a single one."""
    words = np.flatnonzero(mask)
    if len(words) != 1:
        return None
    word = int(mask[words[0]])
    return int(words[0]) * 32 + word.bit_length() - 1 if word & (word - 1) == 0 else None
