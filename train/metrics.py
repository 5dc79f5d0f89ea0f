"""Where numbers go: JSON lines in `metrics.jsonl`, the same to TensorBoard, and a short line for people."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tensorboardX import SummaryWriter

from train.config import TrainConfig
from train.step import StepMetrics

Record = Mapping[str, float]
OnStep = Callable[[int, Record], None]


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is not finite; the last checkpoint is from before."""


class MetricsLog:
    """The metrics of one run folder, cut back to the step that training restarts from.

    `metrics.jsonl` holds one object a line: `step`, `kind` ("train" or "eval"), then the numbers. Lines
    past `start_step`, which a killed run wrote and a resumed one will write again, are dropped on opening,
    and so is a line that the kill left half written. Every line is flushed at once: a killed process loses
    none. Where several processes train, one of them writes; the others' logs are mute.
    """

    def __init__(self, run_dir: Path, start_step: int, *, is_mute: bool = False):
        self._is_mute = is_mute
        if is_mute:
            return
        self.path = run_dir / "metrics.jsonl"
        _drop_lines_after(self.path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        # purge_step hides what a killed run wrote beyond the restored step from TensorBoard as well.
        self._board = SummaryWriter(str(run_dir / "tb"), purge_step=start_step + 1)

    def write(self, step: int, kind: str, record: Record) -> None:
        """Appends one record."""
        if self._is_mute:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Forces every line to the disk; called before a checkpoint that claims their steps."""
        if self._is_mute:
            return
        os.fsync(self._file.fileno())
        self._board.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_mute:
            return
        self._file.close()
        self._board.close()


class StepReporter:
    """Fetches the metrics of a step while the next one runs, so that the device never waits for the host."""

    def __init__(self, log: MetricsLog, config: TrainConfig, on_step: OnStep | None, echo: Callable[[str], None]):
        self._log, self._config, self._on_step, self._echo = log, config, on_step, echo
        self._pending: tuple[int, StepMetrics] | None = None
        self._clear_interval()
        self.restart_clock()

    def push(self, step: int, metrics: StepMetrics) -> None:
        """Takes over a step that is still running, and reports the one before it.

        Raises:
            TrainingDiverged: that one's loss or gradient norm is not finite.
        """
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the pending step and reports it; no-op when there is none.

        Raises:
            TrainingDiverged: its loss or gradient norm is not finite.
        """
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise TrainingDiverged(
                f"step {step}: loss={metrics['loss']}, grad_norm={metrics['grad_norm']}; the "
                "last checkpoint is from before. Lower learning_rate, or look at the data."
            )
        now = time.perf_counter()
        self._busy_s, self._started = self._busy_s + now - self._started, now
        self._num_steps += 1
        self._tokens += metrics["tokens"]
        self._supervised_tokens += metrics["supervised_tokens"]
        if step in (1, self._config.steps) or step % self._config.log_every == 0:
            self._write(step, metrics)
        if self._on_step:
            self._on_step(step, metrics)

    def restart_clock(self) -> None:
        """Leaves the time since the last report, an evaluation or a save, out of the speed."""
        self._started = time.perf_counter()

    def _write(self, step: int, metrics: Record) -> None:
        seconds = self._busy_s / self._num_steps
        record = {
            **metrics,
            "ms_per_step": seconds * 1e3,
            "tokens_per_s": self._tokens / self._busy_s,
            "supervised_tokens_per_s": self._supervised_tokens / self._busy_s,
            "eta_s": (self._config.steps - step) * seconds,
        }
        self._log.write(step, "train", record)
        self._echo(format_train(step, self._config.steps, record))
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._busy_s, self._num_steps, self._tokens, self._supervised_tokens = 0.0, 0, 0.0, 0.0


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All complete records of a run, in order; none when it has not started."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def format_train(step: int, steps: int, record: Record) -> str:
    """One line of training progress."""
    names = ("loss", "ce_noisy", "ce_clean", "alpha")
    losses = " · ".join(f"{name} {record[name]:.4f}" for name in names if name in record)
    speed = f"{record['ms_per_step']:.0f} ms/step · {record['tokens_per_s']:,.0f} tok/s"
    supervised = f"{record['supervised_tokens_per_s']:,.0f} supervised tok/s"
    left = format_duration(record["eta_s"])
    return (
        f"step {step:>{len(str(steps))}}/{steps} · {losses} · lr {record['lr']:.2e} · "
        f"grad_norm {record['grad_norm']:.3f} · {speed} · {supervised} · eta {left}"
    )


def format_eval(step: int, record: Record) -> str:
    """One line of held-out results; brackets hold a measure by depth inside a block."""
    parts = []
    for name, value in record.items():
        if "/depth_" not in name:
            by_depth = [f"{record[key]:.3f}" for key in record if key.startswith(f"{name}/depth_")]
            parts.append(f"{name} {value:.4f}" + (f" [{' '.join(by_depth)}]" if by_depth else ""))
    return f"eval at step {step} · " + " · ".join(parts)


def format_duration(seconds: Any) -> str:
    """Seconds as 12s, 3m05s or 2h07m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
