"""What the engine itself costs: processor time of its thread per step, and how long a device would wait for it.

    python -m benchmarks.host_time [--batch 32] [--stride 4] [--device-ms 5] [--trace trace.json]

The device is a stand-in that computes nothing: it commits random numbers of tokens, and keeps each step's outcome back
for as long as it is told to. No model runs, so the numbers are the host's alone.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from flax import nnx

from idlm_jax.config import ModelConfig
from idlm_jax.decoding import ISD, SamplingParams
from idlm_jax.decoding.state import Finish
from idlm_jax.model.language_model import from_module
from idlm_jax.model.transformer import Qwen3
from idlm_jax.qwen3_sizes import QWEN3_SIZES
from serve.config import EngineConfig
from serve.device import Draws
from serve.engine import Engine
from serve.packing import Layout, layout_of


class Span(NamedTuple):
    """A stretch of time on a line of the trace, in seconds."""

    line: Literal["device computes", "engine waits for the device"]
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class HostTime:
    """What was measured.

    Attributes:
        num_steps: steps measured.
        median_ms: processor time of the engine's thread per step, half of the steps took less.
        p99_ms: 99 of 100 steps took less.
        idle_share: share of the time from the first step to the last in which the device had nothing to do.
        spans: what happened when.
    """

    num_steps: int
    median_ms: float
    p99_ms: float
    idle_share: float
    spans: list[Span]


class Later:
    """An outcome that is there at some time. Whoever waits for it is put down in `spans`."""

    def __init__(self, words: np.ndarray, ready_at: float, spans: list[Span]):
        self._words, self._ready_at, self._spans = words, ready_at, spans

    def __array__(self) -> np.ndarray:
        start = time.perf_counter()
        time.sleep(max(0.0, self._ready_at - start))
        self._spans.append(Span("engine waits for the device", start, time.perf_counter()))
        return self._words


class StandIn:
    """Runs one program after the other, each for `seconds`, without computing anything."""

    def __init__(self, layout: Layout, seconds: float):
        self._layout, self._seconds = layout, seconds
        self._rng = np.random.default_rng(0)
        self._left = np.zeros(layout.idle_slot + 1, np.int64)  # tokens that each slot may still commit
        self._forwards = np.zeros_like(self._left)
        self.spans: list[Span] = []
        self._first: float | None = None
        self._busy_until = self._idle = 0.0

    def decode(self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0) -> Later:
        """Commits 1 to stride tokens in each slot."""
        stride = self._layout.num_masks + 1
        return self._commit(words[:, 0], self._rng.integers(1, stride + 1, len(words)), stride)

    def prefill(self, words: np.ndarray, masks: np.ndarray | None = None, choice: int = 0) -> Later:
        """Commits one token; the words are those of `serve.packing.pack_chunks`."""
        slots, start, num_tokens, is_last, _, _, end = words[:, :7].T
        self._left[slots] = end - start - num_tokens
        self._forwards[slots] = 0
        return self._commit(slots, is_last.astype(np.int64), 1)

    def reset(self) -> None:
        """There is nothing to reset."""

    @property
    def idle_share(self) -> float:
        """Idle time over all time so far."""
        return 0.0 if self._first is None else self._idle / (self._busy_until - self._first)

    def _commit(self, slots: np.ndarray, wanted: np.ndarray, num_rows: int) -> Later:
        masks = self._layout.num_masks
        num_tokens = np.minimum(wanted, self._left[slots])
        self._left[slots] -= num_tokens
        self._forwards[slots] += 1
        words = np.zeros((len(slots), 5 + 4 * masks + num_rows), np.int32)
        words[:, 0] = num_tokens
        words[:, 1] = np.where(self._left[slots] == 0, Finish.LENGTH, Finish.RUNNING)
        words[:, 2] = masks
        words[:, 3] = self._forwards[slots]
        now = time.perf_counter()
        if self._first is None:
            self._first = self._busy_until = now
        self._idle += max(0.0, now - self._busy_until)
        start = max(now, self._busy_until)
        self._busy_until = start + self._seconds
        self.spans.append(Span("device computes", start, self._busy_until))
        return Later(words, self._busy_until, self.spans)


def measure(
    config: EngineConfig, model: ModelConfig, device_ms: float, *, rounds: int = 8, max_tokens: int = 200
) -> HostTime:
    """Serves `rounds` times as many requests as run at once.

    Args:
        config: of the engine.
        model: its shape; no parameters are made.
        device_ms: how long each program keeps the stand-in busy.
        rounds: requests per slot.
        max_tokens: of each request.
    """
    lm = from_module(nnx.eval_shape(lambda: Qwen3(model, rngs=nnx.Rngs(0))))
    layout = layout_of(config.limits(model), config.max_stop_ids, config.num_biases)
    device = StandIn(layout, device_ms / 1000)
    at: list[float] = []
    rng = np.random.default_rng(0)
    with Engine(lm, config, device=device, after_step=lambda scheduler: at.append(time.thread_time())) as engine:
        for _ in range(rounds * config.max_running):
            prompt = rng.integers(0, 1000, size=int(rng.integers(20, 300))).tolist()
            engine.submit(prompt, SamplingParams(max_tokens=max_tokens, temperature=1.0))
    per_step = np.diff(at) * 1000
    median, p99 = np.percentile(per_step, [50, 99])
    return HostTime(len(per_step), float(median), float(p99), device.idle_share, device.spans)


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """In Chrome's format, for https://ui.perfetto.dev."""
    events = [
        {"name": line, "ph": "X", "pid": 0, "tid": line, "ts": 1e6 * start, "dur": 1e6 * (end - start)}
        for line, start, end in spans
    ]
    path.write_text(json.dumps({"traceEvents": events}))


def main() -> int:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--device-ms", type=float, default=5.0)
    parser.add_argument("--trace", type=Path, help="a JSON file to look at in Perfetto")
    args = parser.parse_args()
    config = EngineConfig(method=ISD(stride=args.stride), max_running=args.batch, num_pages=64 * args.batch)
    found = measure(config, QWEN3_SIZES["Qwen3-8B"], args.device_ms)
    if args.trace is not None:
        write_trace(args.trace, found.spans)
    print(
        f"batch {args.batch}, stride {args.stride}, {found.num_steps} steps of {args.device_ms} ms: "
        f"host {found.median_ms:.3f} ms a step (median; 99 % below {found.p99_ms:.3f}), "
        f"device idle {100 * found.idle_share:.2f} %"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
