"""Which method the next forward runs: most tokens a second, from what was accepted and what a step takes. No JAX.

    tokens per forward   a chain over acceptance by depth (`chain`), corrected by what was counted
    seconds per forward  measured before the first request for each batch size, followed while steps are taken

Small batches are bound by reading weights, so that rows are nearly free and many of them pay; large ones are bound by
rows, so that AR wins unless drafts are very good. Where the two meet is measured, never assumed.
"""

from collections.abc import Sequence

import numpy as np

from idlm_jax.decoding.chain import chain_of, tokens_per_forward
from idlm_jax.decoding.method import Method

# A rival must be better by this much. Half of what auto may lose to the best fixed method, so as to notice it at all.
HYSTERESIS = 1.01
# A method that is not running is not measured, and its figures age. Two forwards in 512 of a method that takes three
# times as long as AR cost 0.7 % of the time.
CONSIDER_EVERY = 8  # forwards between two looks at the rates
PROBE_EVERY = 512
PROBE_FORWARDS = 2
# A method is worth a probe if it may be the best after all.
PROBE_WITHIN = 0.75
HALF_LIFE = 4096  # drafts or windows after which an observation counts half
PRIOR_DRAFTS = 8.0  # weight of a depth's prior: the acceptance one place before, or FIRST_ACCEPTANCE
PRIOR_FORWARDS = 256.0  # weight of the chain against counted tokens per forward
FIRST_ACCEPTANCE = 0.7
# Weight of one step's time against those before. It mostly says how fast the machine is now, which concerns all: else
# every slow minute would make what is running look worse than what is not, and the best of six noisy figures is one
# that is too good. How methods compare was timed in turns, at rest; what running says of that counts little.
FOLLOW_ALL, FOLLOW_ONE = 0.05, 0.005
OUTLIER = 1.5  # one step's time moves the estimate as if it were at most this many times as long or short


class Pacer:
    """Chooses from a menu. Not thread-safe."""

    def __init__(self, menu: Sequence[Method]):
        """Args: fixed methods, by ascending stride and rows; choices are indices into it."""
        self.menu = tuple(menu)
        most = max(method.num_masks for method in self.menu)
        self._verified, self._accepted = [0.0] * most, [0.0] * most
        self._forwards, self._tokens = [0.0] * len(self.menu), [0.0] * len(self.menu)
        self._seconds: dict[int, dict[int, float]] = {}
        self._current: dict[int, int] = {}
        self._num_chosen = 0

    def set_seconds(self, batch: int, index: int, seconds: float) -> None:
        """What a forward of `batch` windows takes; a method without a time is never chosen for that batch."""
        self._seconds.setdefault(batch, {})[index] = seconds

    def is_timed(self, batch: int, index: int) -> bool:
        """Whether the method can be chosen at this batch size."""
        return index in self._seconds.get(batch, {})

    def follow_seconds(self, batch: int, index: int, seconds: float) -> None:
        """Takes note of what a step has taken, contexts and host included; outliers count for little."""
        known = self._seconds[batch]
        ratio = min(max(seconds / known[index], 1 / OUTLIER), OUTLIER)
        known[index] *= ratio**FOLLOW_ONE
        for each in known:
            known[each] *= ratio**FOLLOW_ALL

    def observe(self, index: int, forwards: int, tokens: int, verified: Sequence[int], accepted: Sequence[int]) -> None:
        """Takes note of what came of windows.

        Args:
            index: the method that ran.
            forwards: windows.
            tokens: committed by them.
            verified: drafts whose fate decided a token, by depth.
            accepted: how many of them were accepted, by depth.
        """
        kept = 0.5 ** (sum(verified) / HALF_LIFE)
        for depth in range(len(self._verified)):
            self._verified[depth] *= kept
            self._accepted[depth] *= kept
        for depth, (seen, good) in enumerate(zip(verified, accepted, strict=True)):
            self._verified[depth] += seen
            self._accepted[depth] += good
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

    def tokens_per_forward(self, index: int) -> float:
        """Expected of a method that runs for a while."""
        method = self.menu[index]
        chain = chain_of(np.array(self.acceptance()[: method.num_masks]), int(method.branches))
        expected = PRIOR_FORWARDS * float(tokens_per_forward(chain))
        return (self._tokens[index] + expected) / (self._forwards[index] + PRIOR_FORWARDS)

    def rates(self, batch: int) -> dict[int, float]:
        """Tokens a second of each window, by method, as far as they are timed at this batch size."""
        return {index: self.tokens_per_forward(index) / seconds for index, seconds in self._seconds[batch].items()}

    def choose(self, batch: int) -> int:
        """The method of the next forward over `batch` windows.

        Raises:
            KeyError: nothing was timed at this batch size.
        """
        self._num_chosen += 1
        since = self._num_chosen % PROBE_EVERY
        if since < PROBE_FORWARDS and self._num_chosen >= PROBE_EVERY:
            rivals = self._rivals(batch)
            return rivals[self._num_chosen // PROBE_EVERY % len(rivals)] if rivals else self._current[batch]
        if batch not in self._current or self._num_chosen % CONSIDER_EVERY == 0:
            rates = self.rates(batch)
            best = max(rates, key=lambda index: (rates[index], -index))
            current = self._current.setdefault(batch, best)
            if rates[best] > HYSTERESIS * rates[current]:
                self._current[batch] = best
        return self._current[batch]

    def _rivals(self, batch: int) -> list[int]:
        """Methods worth a probe."""
        rates, current = self.rates(batch), self._current.setdefault(batch, min(self._seconds[batch]))
        rivals = [each for each in rates if each != current and rates[each] >= PROBE_WITHIN * rates[current]]
        if self.menu[current].num_masks == 0 and not rivals:
            # AR says nothing of how good drafts would be: ask the cheapest that could ever be better.
            rivals = [each for each in rates if each != current and self.could_win(batch, each)][:1]
        return rivals

    def could_win(self, batch: int, index: int) -> bool:
        """Whether the method would beat AR at this batch size if all its drafts were accepted; true of AR itself."""
        seconds = self._seconds[batch]
        stride = self.menu[index].num_masks + 1
        ar = [seconds[other] for other in seconds if self.menu[other].num_masks == 0]
        return stride == 1 or not ar or stride * ar[0] > seconds[index]
