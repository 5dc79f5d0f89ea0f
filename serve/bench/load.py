"""When requests are sent. A load is told how many there are and calls `send(number, due)` for each."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

Send = Callable[[int, float], Coroutine[Any, Any, None]]


@dataclasses.dataclass(frozen=True)
class Closed:
    """As many callers as `concurrency`, each of whom asks again as soon as he is answered."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"{self.concurrency=} must be at least 1")

    @property
    def label(self) -> str:
        return f"closed {self.concurrency}"

    async def run(self, send: Send, num_requests: int, seed: Sequence[int]) -> None:
        """Sends all; returns when the last is answered. `seed` changes nothing: there is nothing random."""
        numbers = iter(range(num_requests))

        async def caller() -> None:
            for number in numbers:  # shared by the callers
                await send(number, time.perf_counter())

        async with asyncio.TaskGroup() as callers:
            for _ in range(min(self.concurrency, num_requests)):
                callers.create_task(caller())


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Callers who know nothing of each other nor of the server: `rate` a second, with exponential gaps."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"{self.rate=} must be positive and finite")

    @property
    def label(self) -> str:
        return f"poisson {self.rate:g}/s"

    def gaps(self, num_gaps: int, seed: Sequence[int]) -> list[float]:
        """Seconds between successive requests; equal seeds give equal gaps."""
        return np.random.default_rng(seed).exponential(1 / self.rate, num_gaps).tolist()

    async def run(self, send: Send, num_requests: int, seed: Sequence[int]) -> None:
        """Sends all, the first at once; returns when the last is answered."""
        await _open_loop(send, [0.0, *self.gaps(num_requests - 1, seed)])


@dataclasses.dataclass(frozen=True)
class Burst:
    """Everybody at once."""

    @property
    def label(self) -> str:
        return "burst"

    async def run(self, send: Send, num_requests: int, seed: Sequence[int]) -> None:
        """Sends all; returns when the last is answered. `seed` changes nothing: there is nothing random."""
        await _open_loop(send, [0.0] * num_requests)


Load = Closed | Poisson | Burst


async def _open_loop(send: Send, gaps: Sequence[float]) -> None:
    due = time.perf_counter()
    async with asyncio.TaskGroup() as requests:
        for number, gap in enumerate(gaps):
            due += gap
            # Also without a pause the loop gets its turn, so that the first are under way while the last are made.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            requests.create_task(send(number, due))
