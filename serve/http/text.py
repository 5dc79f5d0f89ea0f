"""From committed ids to text that may be shown."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from serve.http.message import overlap


class TextStream:
    """The text of one completion, token by token.

    Held back: what ends inside a UTF-8 character, and what may be the beginning of a stop string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        *,
        skips_special: bool = True,
        min_tokens: int = 0,
    ):
        """Starts before the text.

        Args:
            tokenizer: of the model.
            stops: end the text where the first of them begins.
            skips_special: leaves special tokens out.
            min_tokens: in the text of so many tokens nothing counts as a stop string.
        """
        self.matched: str | None = None
        self._tokenizer, self._skips_special, self._stops = tokenizer, skips_special, tuple(stops)
        self._backend: Any = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=skips_special)
        self._ids: list[int] = []
        self._min_tokens = min_tokens
        self._num_decoded = 0  # characters that have left the decoder
        self._held = ""

    def push(self, token_id: int) -> str:
        """Takes a token; returns the text that is now certain. Nothing more comes once `matched` is set."""
        self._ids.append(token_id)
        text = self._decoder.step(self._backend, token_id) or ""
        self._num_decoded += len(text)
        return text if len(self._ids) <= self._min_tokens else self._release(text)

    def finish(self) -> str:
        """The rest, when no token follows: what was held back, with a replacement for a broken character."""
        if self.matched is not None:
            return ""
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=self._skips_special))
        text = self._release(whole[self._num_decoded :])
        if self.matched is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        held = self._held + text
        found = [(place, stop) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            place, self.matched = min(found)
            self._held = ""
            return held[:place]
        # Nothing held is longer than the longest stop string, so this costs little.
        keep = max((overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]
