"""Checkpoints of a run: its arrays, written in the background, restored exactly, onto any mesh and host count.

The position in the data needs no file of its own: a batch is a function of its number, which is the step. The Orbax v1
API is used here and nowhere else, because its names may still move before 1.0.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

State = TypeVar("State")


class OtherModel(ValueError):
    """The arrays on disk are not those of the run."""


def _ignore(line: str) -> None:
    del line


class Checkpoints:
    """The checkpoints of one run folder: `checkpoints/<step>/state`.

    Both policies are spelled out: Orbax's defaults save as often as they can and keep everything. A save
    copies the arrays before it returns and writes in the background; a checkpoint is visible only once it
    is complete, so a process killed in the middle leaves the previous one as the latest. Several processes
    make the same calls, and each writes its part of the arrays.
    """

    def __init__(self, run_dir: Path, *, save_every: int, keep: int, keep_best: bool = False):
        self._folder = run_dir / "checkpoints"
        # Any: the hints of this Orbax release name one step-info class in its policies and another here.
        save_policy: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(save_every)
        policies = ocp.training.preservation_policies
        keep_policy: Any = policies.LatestN(keep)
        if keep_best:
            best: Any = policies.BestN(
                get_metric_fn=lambda metrics: metrics["score"], n=1, keep_checkpoints_without_metrics=False
            )
            keep_policy = policies.AnyPreservationPolicy([keep_policy, best])
        self._orbax = ocp.training.Checkpointer(
            str(self._folder.resolve()),
            save_decision_policy=save_policy,
            preservation_policy=keep_policy,
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    @property
    def latest_step(self) -> int:
        """Step of the newest complete checkpoint, 0 when there is none."""
        return max(self.steps, default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score of the saved checkpoint with the highest score; None when none has one."""
        found: Any = self._orbax.checkpoints
        scored = [(each.metrics["score"], each.step) for each in found if each.metrics]
        return (max(scored)[1], max(scored)[0]) if scored else None

    def is_best(self, score: float) -> bool:
        """Whether no saved checkpoint has as high a score."""
        best = self.best
        return best is None or score > best[1]

    def is_due(self, step: int) -> bool:
        return self._orbax.should_save(step)

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Starts a save; a step that is already saved is left alone.

        Args:
            step: optimizer steps taken.
            state: pytree of arrays.
            score: of an evaluation at this very step, higher is better; None where there was none.

        Raises:
            OSError: the save before could not be written.
        """
        if step != self.latest_step:
            metrics: Any = None if score is None else {"score": score}
            with self._naming_failures():
                self._orbax.save_checkpointables_async(step, {"state": state}, metrics=metrics, force=True)

    def restore(
        self, like: State, *, step: int | None = None, tell: Callable[[str], None] = _ignore
    ) -> tuple[State, int]:
        """A state in the shapes, dtypes and placement of `like`, and its step.

        Args:
            like: pytree of arrays.
            step: which checkpoint; None for the newest that can be read. One that cannot, because a disk or a copy
                broke it, is moved out of the way, into `unreadable/`, and `tell` is told.
            tell: takes a line for people.

        Raises:
            ValueError: the arrays on disk have other names or shapes, which are listed; or nothing can be read.
        """
        if step is not None:
            return self._read(step, like), step
        unreadable: list[int] = []
        for step in reversed(self.steps):
            try:
                state = self._read(step, like)
            except OtherModel:
                raise
            except Exception as error:  # whatever Orbax and its storage make of a broken file
                reason = str(error).strip().splitlines()[0]
                if jax.process_count() > 1:
                    # Others may be able to read their parts, and would go on from another step.
                    raise ValueError(f"checkpoint {step} cannot be read; move it away to go back: {reason}") from error
                tell(f"checkpoint {step} cannot be read, going back to the one before: {reason}")
                unreadable.append(step)
                continue
            self._set_aside(unreadable)
            return state, step
        raise ValueError(f"none of the checkpoints {sorted(unreadable)} in {self._folder} can be read")

    def _read(self, step: int, like: State) -> State:
        saved, wanted = _shapes(self._orbax.metadata(step).metadata), _shapes(like)
        if not saved:
            raise ValueError("it names no array")
        wrong = [
            f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if wrong:
            raise OtherModel(f"checkpoint {step} is of another model:\n" + "\n".join(wrong))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._orbax.load_checkpointables(step, {"state": abstract})["state"]

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            target = self._folder.parent / "unreadable" / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        if steps:
            self._orbax.reload()

    def read_arrays(self) -> dict[str, np.ndarray]:
        """Every array of the newest checkpoint by name, on the host: for inspection and tests."""
        one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_device),
            self._orbax.metadata().metadata,
        )
        state = self._orbax.load_checkpointables(None, {"state": abstract})["state"]
        return {_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}

    def wait(self) -> None:
        """Blocks until the save in flight is on the disk.

        Raises:
            OSError: it could not be written.
        """
        with self._naming_failures():
            self._orbax.wait()

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk comes as a ValueError of the storage library
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"a checkpoint could not be written (those of steps {self.steps} are whole): {reason}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._orbax.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    # Orbax reads modules and tuples back as dicts and lists, so trees are compared by the names of their leaves.
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
