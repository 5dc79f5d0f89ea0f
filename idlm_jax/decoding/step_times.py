"""How long a forward of each method takes at one batch size, and how sure that is. No JAX.

A machine is slower in one minute than in the next, for all methods alike, and only one method runs at a time: how long
it takes says at once how fast the machine is, and little of how methods compare. Both are estimated together, by a
Kalman filter over

    log seconds of the first method   wanders quickly
    log ratio of each other to it     hardly changes

so that what is learnt of a ratio comes from the moments at which the method changes.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

# Standard deviations, of logarithms. Of each time at rest, on idle slots, short contexts and few steps; and of how fast
# the machine will be in earnest.
FIRST_ERROR, FIRST_PACE_ERROR = 0.1, 0.5
# Of one forward against its neighbours: a guess, then followed, down to what clocks and schedulers always do.
FIRST_NOISE, LEAST_NOISE, FOLLOW_NOISE = 0.1, 0.01, 0.05
# Per forward: how far the machine wanders, as a share of that noise; and a ratio, as contexts grow.
MACHINE_DRIFT, RATIO_DRIFT = 0.17, 5e-4
# A surprise beyond so many standard deviations counts as if it were no more: pauses are none of the method's.
FAR = 2.5


class StepTimes:
    """Seconds of forwards, by method. The first must be timed first."""

    def __init__(self, num_methods: int):
        self._mean = np.zeros(num_methods)
        self._cov = np.zeros((num_methods, num_methods))
        self._noise = FIRST_NOISE**2
        self.timed: set[int] = set()

    def set(self, index: int, seconds: float) -> None:
        """Forgets what was known of the method: it takes so long at rest."""
        self._mean[index] = np.log(seconds) - (self._mean[0] if index else 0.0)
        error = FIRST_ERROR**2
        if index == 0:
            self._cov[0, 0] = FIRST_PACE_ERROR**2 + error
        else:
            # The first method's error is in every ratio to it.
            self._cov[index], self._cov[:, index] = error, error
            self._cov[index, 0] = self._cov[0, index] = -error
            self._cov[index, index] = 2 * error
        self.timed.add(index)

    def seconds(self, index: int) -> float:
        """Expected of the next forward."""
        return float(np.exp(self._row(index) @ self._mean))

    def log_ratio(self, index: int) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm of its seconds over those of the first method."""
        return (float(self._mean[index]), float(np.sqrt(self._cov[index, index]))) if index else (0.0, 0.0)

    def follow(self, index: int, seconds: Sequence[float]) -> None:
        """Takes note of forwards in a row, all of one method; their median counts."""
        num = len(seconds)
        found = math.log(statistics.median(seconds))
        for each in self.timed:
            drift = RATIO_DRIFT**2 if each else MACHINE_DRIFT**2 * self._noise
            self._cov[each, each] += num * drift
        row = self._row(index)
        gain = self._cov @ row
        known = row @ gain
        noise = self._noise / num
        error = np.sqrt(known + noise)
        surprise = found - row @ self._mean
        surprise = min(max(surprise, -FAR * error), FAR * error)
        self._mean += gain * (surprise / (known + noise))
        self._cov -= np.outer(gain, gain) / (known + noise)
        # What the estimate could not have known is noise; of `num` forwards, as the median has it.
        excess = num * max(surprise**2 - known, 0.0)
        self._noise = max(self._noise + FOLLOW_NOISE * (excess - self._noise), LEAST_NOISE**2)

    def _row(self, index: int) -> np.ndarray:
        """What of the state adds up to the logarithm of a method's seconds."""
        row = np.zeros(len(self._mean))
        row[[0, index]] = 1.0
        return row
