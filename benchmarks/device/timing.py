"""Times compiled programs against each other: interleaved, warmed up, from several sets of inputs.

One call of a program is one dispatch of `sets` repetitions of an op, each on inputs of its own. So launches are
amortised as in a decode step of many layers, and what one repetition reads is not what the last one left in cache,
where the sets together exceed it. Wall clock around a loop of dispatches that ends with `block_until_ready`; no
profiler, which would also turn off command buffers.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from benchmarks.device.case import MakeInputs, Program

# The sets of a program together: several times the 60 MB of cache of an H200.
WORKING_SET_BYTES = 256 * 2**20
MAX_SETS = 16
SAMPLE_S = 5e-3
REPEATS = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one repetition of an op.

    Attributes:
        median_s: over interleaved samples.
        iqr_s: distance between the quartiles of the samples.
        samples: their number.
    """

    median_s: float
    iqr_s: float
    samples: int


def num_sets(make_inputs: MakeInputs, *, is_dry: bool) -> int:
    """How many sets of inputs exceed the cache; two in a dry run, where interpreted programs are slow to compile."""
    if is_dry:
        return 2
    return max(1, min(MAX_SETS, -(-WORKING_SET_BYTES // max(1, set_bytes(make_inputs)))))


def repeated(program: Program) -> Program:
    """The program on every set, as one program: (first inputs, other inputs) -> outputs."""
    # Jitted so that it is traced and lowered once, not per set; XLA inlines it again.
    once = jax.jit(program)

    def all_sets(firsts: list[Any], others: list[tuple[Any, ...]]) -> list[Any]:
        return [once(first, *rest) for first, rest in zip(firsts, others, strict=True)]

    return all_sets


def abstract_sets(make_inputs: MakeInputs, sets: int) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """Arguments of `repeated` for the compiler."""
    inputs = jax.eval_shape(lambda: make_inputs(0))
    return [inputs[0]] * sets, [inputs[1:]] * sets


def make_sets(make_inputs: MakeInputs, sets: int) -> list[tuple[Any, ...]]:
    """The sets of inputs, each from a seed of its own."""
    return [make_inputs(seed) for seed in range(sets)]


def set_bytes(make_inputs: MakeInputs) -> int:
    """Bytes of one set."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(lambda: make_inputs(0))))


class Runner:
    """A compiled `repeated` program and its sets of inputs; a call dispatches it and returns its outputs."""

    def __init__(self, compiled: Compiled, inputs: list[tuple[Any, ...]], *, donates_first: bool) -> None:
        self._firsts, self._others = [each[0] for each in inputs], [each[1:] for each in inputs]
        if donates_first:  # the caller's inputs may serve other programs
            self._firsts = jax.tree.map(jnp.copy, self._firsts)
        self._compiled, self._donates = compiled, donates_first
        self.sets = len(inputs)

    def __call__(self) -> Any:
        outputs = self._compiled(self._firsts, self._others)
        if self._donates:
            self._firsts = outputs
        return outputs


def interleave(runners: Mapping[str, Runner], *, repeats: int = REPEATS) -> dict[str, Timing]:
    """Takes `repeats` samples of every runner, round by round, so that drift hits all alike."""
    calls = {}
    for name, run in runners.items():
        jax.block_until_ready(run())
        calls[name] = max(1, round(SAMPLE_S / max(_sample(run, 1), 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            samples[name].append(_sample(run, calls[name]) / run.sets)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(samples: list[float]) -> Timing:
    """Median and distance between quartiles."""
    low, high = samples[0], samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median_s=statistics.median(samples), iqr_s=high - low, samples=len(samples))


def _sample(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    outputs = None
    for _ in range(calls):
        outputs = run()
    jax.block_until_ready(outputs)
    return (time.perf_counter() - start) / calls
