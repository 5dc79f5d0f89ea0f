"""What the engine asks of a device, and what a step is while it runs on one."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from serve.device import Draws
from serve.requests import Step


@runtime_checkable  # beartype checks every hint when the tests run
class ReadLater(Protocol):
    """An array that may still be computed; numpy waits for it."""

    def __array__(self) -> np.ndarray: ...


@runtime_checkable
class Runs(Protocol):
    """What the engine asks of a device; `Device` is the real one."""

    def decode(
        self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0
    ) -> ReadLater: ...
    def prefill(self, words: np.ndarray, masks: np.ndarray | None = None, choice: int = 0) -> ReadLater: ...
    def reset(self) -> None: ...


class Launched(NamedTuple):
    """A step on the device."""

    step: Step
    windows: ReadLater | None
    chunks: ReadLater | None
