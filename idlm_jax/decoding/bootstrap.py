"""Confidence intervals over prompts: what might have come out with other prompts of the same kind.

The percentile bootstrap. A resample is a weight per prompt, the number of times that it was drawn, so that any sum over
its prompts is a matrix product. Not scipy.stats.bootstrap: that draws anew for every figure, and a single resample
without a draft at some depth would make the interval nan.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Shaped

RESAMPLES = 2000
CONFIDENCE = 0.95

Weights = Float[np.ndarray, "R P"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval.

    Attributes:
        value: of all prompts.
        low: 2.5th percentile over resampled prompts.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


def resampled(sizes: Sequence[int], seed: int = 0) -> Weights:
    """Weights of `RESAMPLES` resamples.

    Args:
        sizes: prompts of each domain, which follow one another; each is drawn from by itself, so that no resample has
            more of a domain than there was.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate([_times_drawn(rng.integers(0, size, (RESAMPLES, size))) for size in sizes], axis=1)


def _times_drawn(picked: Shaped[np.ndarray, "R P"]) -> Weights:
    rows, size = picked.shape
    flat = picked + size * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def estimate(statistic: Callable[[Weights], Float[np.ndarray, " R"]], weights: Weights) -> Estimate | None:
    """A statistic of weighted prompts and its interval; None where it is undefined (nan) for all of them.

    Resamples in which it is undefined are left out.
    """
    (value,) = statistic(np.ones((1, weights.shape[1])))
    if np.isnan(value):
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(statistic(weights), [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high))


def ratio(above: Shaped[np.ndarray, " P"], below: Shaped[np.ndarray, " P"], weights: Weights) -> Estimate | None:
    """A sum over prompts divided by another, such as tokens over forwards."""
    return estimate(lambda drawn: safe_ratio(drawn @ above, drawn @ below), weights)


def safe_ratio(above: Float[np.ndarray, "*S"], below: Float[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """The quotient; nan where nothing was counted."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
