"""Which method of the menu a step has: asked before it is planned, told afterwards what came of it."""

import time
from collections.abc import Sequence

import numpy as np

from idlm_jax.decoding.pacing import Pacer
from serve.packing import Outcome
from serve.requests import Limits, Step


class Choosing:
    """The pacer, in terms of steps and outcomes. Without one it is always the first of the menu."""

    def __init__(self, limits: Limits, decode_buckets: Sequence[int], pacer: Pacer | None):
        """Args: what the scheduler plans within, batch sizes of the decode programs, and what has timed them."""
        self._limits, self._buckets, self._pacer = limits, decode_buckets, pacer
        # When the last step was read, if it was a decode step alone, and its method, if it decoded at all.
        self._read_at: float | None = None
        self._last_choice: int | None = None

    def bucket(self, num_windows: int) -> int:
        """The batch size of the program that serves so many windows."""
        return next(size for size in self._buckets if size >= num_windows)

    def choose(self, num_decoding: int) -> int:
        """The method of a step in which so many requests decode."""
        return 0 if self._pacer is None else self._pacer.choose(self.bucket(num_decoding))

    def pause(self) -> None:
        """Nothing is computed for now, so the next step cannot be timed by the end of the last."""
        self._read_at = None

    def learn(self, step: Step, outcomes: Sequence[Outcome] | None) -> None:
        """Takes note of a step that was just read; the step behind it is already launched.

        Args:
            step: as planned; its requests are as they were before the outcomes.
            outcomes: of its decode batch.
        """
        if self._pacer is None:
            return
        now = None if step.chunks else time.perf_counter()
        before, self._read_at = self._read_at, now
        if outcomes is None:
            return
        if before is not None and now is not None:
            self._pacer.follow_seconds(self.bucket(len(step.windows)), step.choice, now - before)
        num_masks = self._limits.stride - 1
        verified, accepted = np.zeros(num_masks, np.int64), np.zeros(num_masks, np.int64)
        most = self._limits.windows[step.choice].stride - 1
        num_committed = 0
        for window, outcome in zip(step.windows, outcomes, strict=False):
            if window.is_void:
                continue
            num_tokens = len(outcome.tokens)
            num_committed += num_tokens
            if not outcome.finish:  # those that end are cut short, which says nothing of drafts
                verified[: min(window.request.num_drafts, most, num_tokens)] += 1
                accepted[: num_tokens - 1] += 1
        # Void windows count as forwards: a request whose end nobody could foresee has cost one too many. AR's never do.
        num_forwards = len(step.windows)
        if step.choice != self._last_choice:
            # Its drafts are those of another method: a probe of four such steps would say little of a hundred.
            num_forwards = num_committed = 0
        self._last_choice = step.choice
        self._pacer.observe(step.choice, num_forwards, num_committed, verified.tolist(), accepted.tolist())
