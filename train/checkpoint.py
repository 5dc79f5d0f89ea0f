"""Checkpoints of a run: its arrays, written in the background, restored exactly, onto any mesh and host count.

The position in the data needs no file of its own: a batch is a function of its number, which is the step. The Orbax v1
API is used here and nowhere else, because its names may still move before 1.0.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

State = TypeVar("State")


class Checkpoints:
    """The checkpoints of one run folder: `checkpoints/<step>/state`.

    Both policies are spelled out: Orbax's defaults save as often as they can and keep everything. A save
    copies the arrays before it returns and writes in the background; a checkpoint is visible only once it
    is complete, so a process killed in the middle leaves the previous one as the latest. Several processes
    make the same calls, and each writes its part of the arrays.
    """

    def __init__(self, run_dir: Path, *, save_every: int, keep: int):
        # Any: the hints of this Orbax release name one step-info class in its policies and another here.
        save_policy: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(save_every)
        keep_policy: Any = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(
            str((run_dir / "checkpoints").resolve()),
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

    def is_due(self, step: int) -> bool:
        return self._orbax.should_save(step)

    def save(self, step: int, state: Any) -> None:
        """Starts a save; a step that is already saved is left alone.

        Args:
            step: optimizer steps taken.
            state: pytree of arrays.
        """
        if step != self.latest_step:
            self._orbax.save_checkpointables_async(step, {"state": state}, force=True)

    def restore(self, like: State) -> State:
        """The newest state, in the shapes, dtypes and placement of `like`.

        Args:
            like: pytree of arrays.

        Raises:
            ValueError: the arrays on disk have other names or shapes; lists them.
        """
        saved, wanted = _shapes(self._orbax.metadata().metadata), _shapes(like)
        wrong = [
            f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if wrong:
            raise ValueError(f"checkpoint {self.latest_step} is of another model:\n" + "\n".join(wrong))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._orbax.load_checkpointables(None, {"state": abstract})["state"]

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
        """Blocks until the save in flight is on the disk."""
        self._orbax.wait()

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
