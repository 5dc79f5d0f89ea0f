"""Compiles many programs at once, on all cores, before anything is timed."""

import concurrent.futures
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
from jax.stages import Compiled


def abstract(make_inputs: Callable[[int], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Shapes and dtypes of the inputs, without making them."""
    return jax.eval_shape(lambda: make_inputs(0))


class Compiler:
    """A pool of compilations; XLA works outside Python's lock."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        self._futures: list[Future[Compiled]] = []

    def submit(self, program: Callable[..., Any], *args: Any, donate: bool = False) -> "Future[Compiled]":
        """Starts to compile `program` for abstract `args`; the first argument may be donated."""
        future = self._pool.submit(lambda: jax.jit(program, donate_argnums=(0,) * donate).lower(*args).compile())
        self._futures.append(future)
        return future

    def drain(self, seconds: float) -> None:
        """Drops what has not started and waits for the rest: nothing else may use the device while it is timed."""
        for future in self._futures:
            future.cancel()
        concurrent.futures.wait(self._futures, timeout=seconds)
        self._futures = [future for future in self._futures if future.running()]

    def close(self) -> bool:
        """Drops what has not started. Returns whether a compilation still runs, which nothing can interrupt."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return any(future.running() for future in self._futures)


def describe(error: BaseException) -> str:
    """One line for a table: what kind of error, and the start of what it says."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}"[:300]
