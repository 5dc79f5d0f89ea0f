"""One completion of a request: from the engine's pieces to news of its message."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from idlm_jax.decoding.generate import TokenLogprob
from serve.handle import FinishReason, Piece
from serve.http.message import Part, joined
from serve.http.reasoning import Reasoning
from serve.http.text import TextStream
from serve.http.tools import Calls

Ending = FinishReason | Literal["tool_calls"]


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of one choice.

    Attributes:
        index: of the choice.
        parts: what is new in its message; never taken back.
        num_tokens: tokens whose text this is, and those behind them that have none; 0 while text is held back.
        logprobs: of the tokens that came with it; the text of some may be held back.
        text_offset: characters of this choice's tokens before those of `logprobs`.
        finish_reason: set once, with the last delta.
        matched_stop: the stop string or token id that ended it.
    """

    index: int
    parts: list[Part] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    text_offset: int = 0
    finish_reason: Ending | None = None
    matched_stop: str | int | None = None


class Choice:
    """One completion under way."""

    def __init__(
        self,
        index: int,
        text: TextStream,
        token_text: Callable[[int], str],
        *,
        echo: str = "",
        reasoning: Reasoning | None = None,
        calls: Calls | None = None,
    ):
        """Starts before the first token.

        Args:
            index: among the choices of a request.
            text: makes text of tokens.
            token_text: the text of a single one.
            echo: shown before the text.
            reasoning: splits the text; None if all of it is the answer.
            calls: finds calls in the answer; None if there are no tools.
        """
        self.index, self.echo = index, echo
        self.num_tokens = self.num_reasoning_tokens = 0
        self.finish_reason: Ending | None = None
        self._text, self._token_text = text, token_text
        self._reasoning, self._calls = reasoning, calls
        self._has_called = False
        self._num_untold = self._text_offset = 0

    def take(self, piece: Piece) -> Delta:
        """The news in a piece. The token or string that ends a choice is counted, and not shown."""
        reason: Ending | None = piece.finish_reason
        matched: str | int | None = None
        parts: list[Part] = []
        num_taken = 0
        for token in piece.token_ids:
            num_taken += 1
            was_thinking = self._is_thinking
            if reason == "stop" and num_taken == len(piece.token_ids):
                matched = token
            else:
                parts += self._understand(self._text.push(token))
            if was_thinking or self._is_thinking:
                self.num_reasoning_tokens = self.num_tokens + num_taken
            if self._text.matched is not None:
                reason = "stop"
                break
        if reason is not None:
            parts += self._understand(self._text.finish(), is_last=True)
            if self._text.matched is not None:
                reason, matched = "stop", self._text.matched
        parts = joined(parts)
        self._has_called |= any(part.kind == "call" for part in parts)
        if reason == "stop" and self._has_called:
            reason = "tool_calls"
        self.num_tokens += num_taken
        self._num_untold += num_taken
        self.finish_reason = reason
        logprobs = (piece.logprobs or [])[:num_taken]
        told, self._num_untold = (self._num_untold, 0) if parts or reason else (0, self._num_untold)
        delta = Delta(self.index, parts, told, logprobs, self._text_offset, reason, matched)
        self._text_offset += sum(len(self._token_text(each.token_id)) for each in logprobs)
        return delta

    @property
    def _is_thinking(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_thinking

    def _understand(self, text: str, *, is_last: bool = False) -> list[Part]:
        parts = [Part("content", text)] if text else []
        if self._reasoning is not None:
            parts = self._reasoning.push(text) + (self._reasoning.finish() if is_last else [])
        if self._calls is not None:
            thoughts = [part for part in parts if part.kind == "reasoning"]
            answer = "".join(part.text for part in parts if part.kind == "content")
            parts = thoughts + self._calls.push(answer) + (self._calls.finish() if is_last else [])
        return parts
