"""Where numbers go: JSON lines in `metrics.jsonl`, the same to TensorBoard and W&B, and a short line for people."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tensorboardX import SummaryWriter

from train.config import ConfigError, TrainConfig
from train.guard import SpikeGuard
from train.step import StepMetrics

Record = Mapping[str, float]
OnStep = Callable[[int, Record], None]


class MetricsLog:
    """The metrics of one run folder, cut back to the step that training restarts from.

    `metrics.jsonl` holds one object a line: `step`, `kind` ("train" or "eval"), then the numbers. Lines
    past `start_step`, which a killed run wrote and a resumed one will write again, are dropped on opening,
    and so is a line that the kill left half written. Every line is flushed at once: a killed process loses
    none. Where several processes train, one of them writes; the others' logs are mute. `wandb_run` is what
    `open_wandb` returns.
    """

    def __init__(self, run_dir: Path, start_step: int, *, is_mute: bool = False, wandb_run: Any = None):
        self._is_mute = is_mute
        if is_mute:
            return
        self._wandb = wandb_run
        self.path = run_dir / "metrics.jsonl"
        drop_lines_after(self.path, start_step)
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
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in record.items()}, step=step)

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
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def open_wandb(config: TrainConfig) -> Any:
    """The Weights & Biases run of this run folder, the same one when it is resumed; None where none is asked for.

    Raises:
        ConfigError: it is asked for, and wandb is not installed.
    """
    if config.wandb_project is None:
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(f"wandb_project={config.wandb_project!r} needs wandb: pip install wandb") from None
    run_id = hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=config.wandb_project,
        name=config.run_name,
        id=run_id,
        resume="allow",
        dir=str(config.run_dir),
        config=dataclasses.asdict(config),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What turns a step's metrics into FLOP/s.

    Attributes:
        flops_of: operations of a step, from its number and metrics, over all devices.
        num_devices: that the run uses.
        peak: operations a second of one device at most; None where it is not known.
    """

    flops_of: Callable[[int, Record], float]
    num_devices: int
    peak: float | None


class StepReporter:
    """Fetches the metrics of a step while the next one runs, so that the device never waits for the host."""

    def __init__(
        self, log: MetricsLog, config: TrainConfig, speed: Speed, on_step: OnStep | None, echo: Callable[[str], None]
    ):
        self._log, self._config, self._speed, self._on_step, self._echo = log, config, speed, on_step, echo
        self._guard = SpikeGuard(config.spike_ratio)
        self._pending: tuple[int, StepMetrics] | None = None
        self._clear_interval()
        self.restart_clock()

    def push(self, step: int, metrics: StepMetrics) -> None:
        """Takes over a step that is still running, and reports the one before it.

        Raises:
            TrainingDiverged: that one's loss or gradient norm is not finite, or its loss a spike.
        """
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the pending step and reports it; no-op when there is none.

        Raises:
            TrainingDiverged: its loss or gradient norm is not finite, or its loss a spike.
        """
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        self._guard.check(step, metrics)
        now = time.perf_counter()
        self._busy_s, self._started = self._busy_s + now - self._started, now
        self._num_steps += 1
        self._tokens += metrics["tokens"]
        self._supervised_tokens += metrics["supervised_tokens"]
        self._flops += self._speed.flops_of(step, metrics)
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
            "tflops_per_device": self._flops / self._busy_s / self._speed.num_devices / 1e12,
            "eta_s": (self._config.steps - step) * seconds,
        }
        if self._speed.peak is not None:
            record["mfu"] = record["tflops_per_device"] * 1e12 / self._speed.peak
        self._log.write(step, "train", record)
        self._echo(format_train(step, self._config.steps, record))
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._busy_s, self._num_steps = 0.0, 0
        self._tokens, self._supervised_tokens, self._flops = 0.0, 0.0, 0.0


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All complete records of a run, in order; none when it has not started."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def format_train(step: int, steps: int, record: Record) -> str:
    """One line of training progress; MFU where the device's peak is known, by the formula of `train.flops`."""
    names = ("loss", "ce_noisy", "kl", "tv", "ce_clean", "alpha")
    stage = f"stage {record['stage']:.0f} · " if "stage" in record else ""
    losses = " · ".join(f"{name} {record[name]:.4f}" for name in names if name in record)
    speed = f"{record['ms_per_step']:.0f} ms/step · {record['tokens_per_s']:,.0f} tok/s"
    supervised = f"{record['supervised_tokens_per_s']:,.0f} supervised tok/s"
    work = f"{record['tflops_per_device']:.3g} TFLOP/s/device"
    work += f" · MFU {record['mfu']:.1%}" if "mfu" in record else ""
    left = format_duration(record["eta_s"])
    return (
        f"step {step:>{len(str(steps))}}/{steps} · {stage}{losses} · lr {record['lr']:.2e} · "
        f"grad_norm {record['grad_norm']:.3f} · {speed} · {supervised} · {work} · eta {left}"
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


def drop_lines_after(path: Path, step: int) -> None:
    """Cuts a JSON-lines file back to the lines of steps up to `step`, half-written lines dropped."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
