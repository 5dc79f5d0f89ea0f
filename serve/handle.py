"""A request as its caller holds it: pieces of committed tokens as they come, statistics, and a way to stop it."""

import dataclasses
import queue
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from idlm_jax.decoding.generate import TokenLogprob
from idlm_jax.decoding.sampling import SamplingParams
from serve.device import Draws, draws_of
from serve.grammar import Constraint
from serve.packing import Tally
from serve.requests import Request

FinishReason = Literal["stop", "length", "abort", "error"]


class EngineError(RuntimeError):
    """The engine failed under a request, or is closed."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one forward committed; the last piece of a request says why it ended, and may hold no tokens.

    Attributes:
        token_ids: committed ids, never drafts.
        finish_reason: None until the last piece.
        logprobs: one entry per token if the request asked for them.
        error: what went wrong, if the reason is "error".
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None


class RequestHandle:
    """What `Engine.submit` returns. Iterate it once, from one thread; `abort` may be called from any."""

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        fixed_words: np.ndarray,
        constraint: Constraint | None,
        abort: Callable[["RequestHandle"], None],
        deliver: Callable[[Piece], None] | None,
        tally: Tally,
    ):
        """Args: as `Engine.submit` makes them; `fixed_words` is what the device is told of `params`."""
        self.request = request
        self.params = params
        self.constraint = constraint
        self.draws: Draws = draws_of(params, has_grammar=constraint is not None)
        self.fixed_words = fixed_words
        self.num_extra_forwards = 0  # prefill forwards before the one that commits
        self.logit_checksums: list[int] = []  # as in `Completion`: one a token in the bit-for-bit mode, else none
        self._abort = abort
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.deliver = self._pieces.put if deliver is None else deliver
        self._before = tally  # in the slots that the request has lost
        self._now = tally
        self._epoch = request.epoch

    @property
    def tally(self) -> Tally:
        """Forwards and drafts so far, whatever slots the request has had."""
        return self._before + self._now

    @property
    def num_forwards(self) -> int:
        """Forwards it took part in, every chunk of its prompt included."""
        return self.tally.forwards + self.num_extra_forwards

    def count(self, tally: Tally) -> None:
        """Takes note of the statistics that came with a forward."""
        if self._epoch != self.request.epoch:
            self._before, self._epoch = self.tally, self.request.epoch
        self._now = tally

    def abort(self) -> None:
        """Ends the request with reason "abort"; tokens already committed may still arrive before that."""
        self._abort(self)

    def __iter__(self) -> Iterator[Piece]:
        """Yields pieces up to the last.

        Raises:
            EngineError: the engine failed under the request.
        """
        while True:
            piece = self._pieces.get()
            if piece.finish_reason == "error":
                raise EngineError(piece.error)
            yield piece
            if piece.finish_reason is not None:
                return

    def result(self) -> tuple[list[int], FinishReason]:
        """All tokens, and why they end; waits for them.

        Raises:
            EngineError: the engine failed under the request.
        """
        pieces = list(self)
        reason = pieces[-1].finish_reason
        assert reason is not None
        return [token for piece in pieces for token in piece.token_ids], reason
