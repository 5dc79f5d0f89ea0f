"""The folder of a run: one owner at a time, and the config that it was begun with."""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator

import jax

from idlm_jax import cluster
from train.checkpoint import Checkpoints
from train.config import ConfigError, TrainConfig, load_config, to_yaml

# What may differ when a run is resumed: nothing that changes a parameter, but for rounding on another mesh.
FREE_KEYS = {
    "output_dir",
    "mesh",
    "offload_optimizer",
    "save_every",
    "keep",
    "keep_best",
    "eval_every",
    "eval_batches",
    "eval_samples",
    "log_every",
    "spike_ratio",
    "profile_start",
    "profile_steps",
    "wandb_project",
}


@contextlib.contextmanager
def exclusive(config: TrainConfig) -> Iterator[None]:
    """One run per folder; process 0 holds the lock, which dies with it, however that ends.

    Raises:
        ConfigError: another process trains here, or the processes of this run disagree about it.
    """
    ours, lock_path = to_yaml(config), config.run_dir / ".lock"
    with contextlib.ExitStack() as held:

        def lock_and_tell() -> str:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            try:
                fcntl.flock(held.enter_context(lock_path.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{config.run_dir} is being trained by another process") from None
            return ours

        if cluster.from_first("lock", lock_and_tell) != ours:
            raise ConfigError(f"process {jax.process_index()} was given another config than process 0")
        if not lock_path.exists():
            raise ConfigError(
                f"process {jax.process_index()} does not see {config.run_dir}, which process 0 has made: output_dir "
                "must be a folder that all hosts share"
            )
        yield


@contextlib.contextmanager
def open_checkpoints(config: TrainConfig) -> Iterator[Checkpoints]:
    """The checkpoints of the run, once the folder's config has been found to be this one, and written down.

    Raises:
        ConfigError: the folder holds checkpoints of a run with other settings.
    """
    snapshot = config.run_dir / "config.yaml"
    with Checkpoints(
        config.run_dir, save_every=config.save_every, keep=config.keep, keep_best=config.keep_best
    ) as checkpoints:
        if checkpoints.latest_step and snapshot.exists():
            before, now = dataclasses.asdict(load_config(snapshot)), dataclasses.asdict(config)
            changed = [key for key in now if key not in FREE_KEYS and now[key] != before[key]]
            if changed:
                raise ConfigError(
                    f"{config.run_dir} was trained for {checkpoints.latest_step} steps with "
                    + ", ".join(f"{key}={before[key]!r} (now {now[key]!r})" for key in changed)
                    + ": choose another run_name, or delete the folder"
                )
        if cluster.is_first():
            # Replaced in one go: a kill in between must not leave half a file, which the next start would refuse.
            partial = snapshot.with_suffix(".partial")
            partial.write_text(to_yaml(config), encoding="utf-8")
            partial.replace(snapshot)
        yield checkpoints
