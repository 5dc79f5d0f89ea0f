"""Which method the next forward runs: most tokens a second, from what was accepted and what a step takes. No JAX.

    tokens per forward   a chain over acceptance by depth (`chain`), corrected by what was counted
    seconds per forward  measured before the first request for each batch size, followed while steps are taken

Small batches are bound by reading weights, so that rows are nearly free and many of them pay; large ones are bound by
rows, so that AR wins unless drafts are very good. Where the two meet is measured, never assumed. Both are known with an
error. The first method of a menu, AR if it is there, runs unless another is better by more than that error: a guess
must not make anybody slower than AR. Methods that may be better are tried now and then, until that is known.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from idlm_jax.decoding.chain import chain_of, tokens_per_forward
from idlm_jax.decoding.method import AR, ISD, Method
from idlm_jax.decoding.step_times import StepTimes

# In forwards. A probe of a method that is slower by a fifth, once in 256 forwards, costs 0.4 % of the time.
CONSIDER_EVERY = 32  # between two looks at the rates
PROBE_EVERY = 256
PROBE_FORWARDS = 4  # the first of them has no drafts to verify, if AR came before it
LONG_SHOT_EVERY = 4  # probes: where nothing may be better than AR, one of what perfect drafts would make better
# Standard deviations: by how many a method must be better, and by how many worse it may be and still be tried.
SURE, HOPEFUL = 1.5, 2.0
HYSTERESIS = 1.01  # half of what "auto" may lose to the best fixed method
FOLLOWED_TOGETHER = 8  # forwards of one method in a row
HALF_LIFE = 4096  # drafts or windows after which an observation counts half
PRIOR_DRAFTS = 8.0  # weight of a depth's prior: the acceptance one place before, or FIRST_ACCEPTANCE
PRIOR_FORWARDS = 256.0  # weight of the chain against counted tokens per forward
FIRST_ACCEPTANCE = 0.7
# Chains are followed again once so much of what is known of acceptance is new: for a menu of six it takes two thirds of
# a millisecond of the host, as long as a small model's step, and less news hardly moves the estimate.
NEWS = 1 / 32


class Rate(NamedTuple):
    """Logarithm of a method's tokens a second over those of the first method, and its standard deviation."""

    log: float
    error: float


class Pacer:
    """Chooses from a menu. Not thread-safe."""

    def __init__(self, menu: Sequence[Method]):
        """Args: fixed methods, by ascending stride and rows; choices are indices into it."""
        self.menu = tuple(menu)
        most = max(method.num_masks for method in self.menu)
        self._verified, self._accepted = [0.0] * most, [0.0] * most
        self._forwards, self._tokens = [0.0] * len(self.menu), [0.0] * len(self.menu)
        # By method: a chain's tokens per forward, until more is known of acceptance; and drafts seen since.
        self._expected: dict[int, np.ndarray] = {}
        self._num_new = 0
        self._times: dict[int, StepTimes] = {}
        self._current: dict[int, int] = {}
        self._num_chosen = self._num_probes = self._probe_left = 0
        self._probed: int | None = None
        # Forwards that were timed and not followed yet, all of one method at one batch size.
        self._pending: tuple[int, int, list[float]] | None = None

    def set_seconds(self, batch: int, index: int, seconds: float) -> None:
        """What a forward of `batch` windows takes; a method without a time is never chosen for that batch.

        The first of the menu comes first: the others are held against it.
        """
        self._times.setdefault(batch, StepTimes(len(self.menu))).set(index, seconds)

    def is_timed(self, batch: int, index: int) -> bool:
        """Whether the method can be chosen at this batch size."""
        return batch in self._times and index in self._times[batch].timed

    def follow_seconds(self, batch: int, index: int, seconds: float) -> None:
        """Takes note of what a step has taken, contexts and host included."""
        if self._pending is None or self._pending[:2] != (batch, index):
            self._follow_pending()
            self._pending = batch, index, []
        self._pending[2].append(seconds)
        if len(self._pending[2]) == FOLLOWED_TOGETHER:
            self._follow_pending()

    def _follow_pending(self) -> None:
        if self._pending is not None:
            batch, index, seconds = self._pending
            self._times[batch].follow(index, seconds)
        self._pending = None

    def observe(self, index: int, forwards: int, tokens: int, verified: Sequence[int], accepted: Sequence[int]) -> None:
        """Takes note of what came of windows.

        Args:
            index: the method that ran.
            forwards: windows.
            tokens: committed by them.
            verified: drafts whose fate decided a token, by depth.
            accepted: how many of them were accepted, by depth.
        """
        if num_drafts := sum(verified):
            kept = 0.5 ** (num_drafts / HALF_LIFE)
            self._verified = [kept * old + new for old, new in zip(self._verified, verified, strict=True)]
            self._accepted = [kept * old + new for old, new in zip(self._accepted, accepted, strict=True)]
            self._num_new += num_drafts
            if self._num_new > NEWS * sum(self._verified):
                self._expected.clear()
                self._num_new = 0
        kept = 0.5 ** (forwards / HALF_LIFE)
        self._forwards[index] = self._forwards[index] * kept + forwards
        self._tokens[index] = self._tokens[index] * kept + tokens

    def acceptance(self) -> list[float]:
        """Probability that the draft at each depth is accepted if those before were; a guess where none was seen."""
        found, before = [], FIRST_ACCEPTANCE
        for seen, good in zip(self._verified, self._accepted, strict=True):
            before = (good + PRIOR_DRAFTS * before) / (seen + PRIOR_DRAFTS)
            found.append(before)
        return found

    def _tokens_range(self, index: int) -> np.ndarray:
        """Tokens per forward with acceptance a standard deviation lower, as it is, and as much higher."""
        if index not in self._expected:
            self._expected[index] = self._expect(self.menu[index])
        found = self._tokens[index] + PRIOR_FORWARDS * self._expected[index]
        return found / (self._forwards[index] + PRIOR_FORWARDS)

    def _expect(self, method: Method) -> np.ndarray:
        assert isinstance(method, AR | ISD)  # nothing else is in a menu of several
        mean = np.array(self.acceptance()[: method.num_masks])
        seen = np.array(self._verified[: method.num_masks])
        error = np.sqrt(mean * (1 - mean) / (seen + PRIOR_DRAFTS + 1))
        acceptance = np.clip(np.stack([mean - error, mean, mean + error]), 0.0, 1.0)
        return tokens_per_forward(chain_of(acceptance, method))

    def rates(self, batch: int) -> dict[int, Rate]:
        """By method, as far as they are timed at this batch size.

        Raises:
            KeyError: none is.
        """
        times = self._times[batch]
        first = np.log(self._tokens_range(0)[1])
        found = {}
        for index in sorted(times.timed):
            low, tokens, high = (np.log(self._tokens_range(index)) - first).tolist()
            log_ratio, error = times.log_ratio(index)
            found[index] = Rate(tokens - log_ratio, math.hypot((high - low) / 2, error) if index else 0.0)
        return found

    def seconds(self, batch: int) -> dict[int, float]:
        """Of the next forward of each method that is timed at this batch size."""
        times = self._times[batch]
        return {index: times.seconds(index) for index in sorted(times.timed)}

    def choose(self, batch: int, forwards: int = 1) -> int:
        """The method of the next forwards over `batch` windows.

        Args:
            batch: a size that was timed.
            forwards: how many, before the next question.

        Raises:
            KeyError: nothing was timed at this batch size.
        """
        before, self._num_chosen = self._num_chosen, self._num_chosen + forwards
        if batch not in self._current or _passes(CONSIDER_EVERY, before, self._num_chosen):
            self._consider(batch)
        if _passes(PROBE_EVERY, before, self._num_chosen):
            self._probed, self._probe_left = self._rival(batch), PROBE_FORWARDS
        if self._probed is not None and self._probe_left > 0 and self.is_timed(batch, self._probed):
            self._probe_left -= forwards
            return self._probed
        return self._current[batch]

    def _consider(self, batch: int) -> None:
        worst = {index: rate.log - SURE * rate.error for index, rate in self.rates(batch).items()}
        best = max(worst, key=lambda index: (worst[index], -index))
        current = self._current.setdefault(batch, best)
        if worst[best] > worst[current] + math.log(HYSTERESIS):
            self._current[batch] = best

    def _rival(self, batch: int) -> int | None:
        """What to try: AR, every other time that it does not run; what may be better than what runs, by the most first.

        And seldom, where AR runs, what cannot be better by all that is known.
        """
        self._num_probes += 1
        rates, current = self.rates(batch), self._current[batch]
        if current and self._num_probes % 2:
            return 0  # a wrong start must not make anybody slower than the first of the menu
        others = [index for index in rates if index != current]
        rivals = [each for each in others if _may_beat(rates[each], rates[current])]
        if rivals:
            # Trying it makes its error smaller, so the others have their turns.
            return max(rivals, key=lambda index: rates[index].log + HOPEFUL * rates[index].error)
        if current or self._num_probes % LONG_SHOT_EVERY:
            return None
        # AR says nothing of how good drafts would be.
        return next((index for index in others if self.could_win(batch, index)), None)

    def could_win(self, batch: int, index: int) -> bool:
        """Whether the method would beat AR at this batch size if all its drafts were accepted; true of AR itself."""
        seconds = self.seconds(batch)
        stride = self.menu[index].num_masks + 1
        ar = [seconds[other] for other in seconds if self.menu[other].num_masks == 0]
        return stride == 1 or not ar or stride * ar[0] > seconds[index]


def _may_beat(rate: Rate, other: Rate) -> bool:
    return rate.log + HOPEFUL * math.hypot(rate.error, other.error) > other.log


def _passes(every: int, before: int, after: int) -> bool:
    return before // every != after // every
