"""Stops a run that has gone wrong before a checkpoint vouches for it, and keeps the batch that did it."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from train.batch import Batch

# Losses that a spike is measured against, and how many there must be before one is looked for.
WINDOW, LEAST = 64, 16


class TrainingDiverged(RuntimeError):
    """A loss or a gradient norm is not finite, or the loss jumped; the last checkpoint is from before."""

    def __init__(self, step: int, reason: str):
        super().__init__(
            f"step {step}: {reason}; the last checkpoint is from before. Lower learning_rate, or look at the data."
        )
        self.step, self.reason = step, reason


class SpikeGuard:
    """Looks at every step's metrics, in order.

    A loss is a spike when it exceeds `ratio` times the median of the losses before it, of the last `WINDOW` ones;
    stages of a curriculum start a new window.
    """

    def __init__(self, ratio: float | None):
        self._ratio = ratio
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._stage = 1.0

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in one step.

        Raises:
            TrainingDiverged: it is not finite, or a spike.
        """
        loss, grad_norm = metrics["loss"], metrics["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDiverged(step, f"loss={loss}, grad_norm={grad_norm}")
        if metrics.get("stage", 1.0) != self._stage:
            self._stage = metrics["stage"]
            self._losses.clear()
        if self._ratio is not None and len(self._losses) >= LEAST:
            usual = statistics.median(self._losses)
            if loss > self._ratio * usual:
                raise TrainingDiverged(step, f"loss={loss:.4g} is over spike_ratio={self._ratio:g} times {usual:.4g}")
        self._losses.append(loss)


class RecentBatches:
    """The batches whose metrics are not known yet: this process' rows of the last two."""

    def __init__(self) -> None:
        self._batches: deque[tuple[int, Batch]] = deque(maxlen=2)

    def push(self, step: int, batch: Batch) -> None:
        self._batches.append((step, batch))

    def save(self, step: int, folder: Path, process: int) -> Path | None:
        """Writes the batch of `step`, arrays named as in `Batch`, into `folder`; None where it is gone."""
        batch = dict(self._batches).get(step)
        if batch is None:
            return None
        path = folder / (f"diverged_step{step}" + (f"_process{process}" if process else "") + ".npz")
        np.savez_compressed(path, **batch._asdict())
        return path
