"""Several processes as one run: how they find each other, and the few moments at which they must agree.

The rest is JAX's: every process runs the same program, and an array is one array wherever its parts lie. Process 0
alone writes for people (metrics, progress, exports); checkpoints are written by all. One process needs none of this.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its client is the one way to wait without a device; Orbax reaches for it too
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.config import ConfigError

_DAY_MS = 24 * 3600 * 1000  # the longest wait for process 0: it may be tokenizing a corpus


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    is_detected: bool = False,
    timeout_s: int = 300,
) -> None:
    """Makes this process one of several, or does nothing when it is the only one; before any device is touched.

    Args:
        coordinator: HOST:PORT on which process 0 listens.
        num_processes: processes of the run.
        process_id: number of this one, from 0.
        is_detected: have JAX find all three: it knows SLURM steps, Open MPI, Kubernetes jobs and Cloud TPU.
        timeout_s: how long to wait until all processes are there.

    Raises:
        ConfigError: some but not all of the three are given, or they do not fit together, or JAX finds no cluster.
        ConnectionError: process 0 does not answer in time. (Should another one be missing, JAX aborts the process.)
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if is_detected and len(missing) < len(given):
        raise ConfigError(f"--distributed has JAX find {', '.join(given)}: give either it or them")
    if not is_detected:
        if len(missing) == len(given):
            return
        if coordinator is None or num_processes is None or process_id is None:
            raise ConfigError(f"{', '.join(given)} belong together: {', '.join(missing)} not given")
        _check(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
        if process_id > 0:
            _wait_for_port(coordinator, timeout_s)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Two programs at once on a CPU would take each other's messages, and wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if is_detected else "deactivate",
            initialization_timeout=timeout_s,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if is_detected:
            raise ConfigError(
                f"--distributed: JAX finds no SLURM step, Open MPI, Kubernetes job or Cloud TPU to use ({reason}); "
                f"name the processes with {', '.join(given)}"
            ) from error
        raise ConnectionError(f"process {process_id} of {num_processes} at {coordinator}: {reason}") from error


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator {coordinator} is not of the form HOST:PORT")
    if num_processes < 1:
        raise ConfigError(f"--num-processes {num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process-id {process_id} must lie in 0..{num_processes - 1} (--num-processes)")


def _wait_for_port(coordinator: str, timeout_s: int) -> None:
    # JAX's own attempt ends in an abort of the process, with a stack trace in C++.
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(1, timeout_s)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(
                    f"process 0 does not answer at --coordinator {coordinator} within {timeout_s} s (--start-timeout)"
                    f": {error}"
                ) from error
            time.sleep(0.2)


def is_first() -> bool:
    """This process is the one that writes."""
    return jax.process_index() == 0


def from_first(name: str, work: Callable[[], str]) -> str:
    """What `work` returns in process 0. The others wait for it, and fail when it fails.

    Args:
        name: of this moment; once in the life of the processes.
        work: called in process 0 alone. It may take long and use its devices, but no array that others hold a part of.

    Raises:
        ConfigError: `work` failed in process 0, where its own error is raised.
    """
    if jax.process_count() == 1:
        return work()
    client: Any = distributed.global_state.client
    key = f"train/{name}"
    if not is_first():
        outcome = client.blocking_key_value_get(key, _DAY_MS)
        if outcome.startswith("-"):
            raise ConfigError(f"process 0 failed: {outcome[1:]}")
        return outcome[1:]
    try:
        result = work()
    except BaseException as error:
        client.key_value_set(key, f"-{error}")
        raise
    client.key_value_set(key, f"+{result}")
    return result


class StopVote:
    """Ends a run after the same step in every process, once any of them is asked to.

    Each step's votes are joined on the devices behind the step itself, and read one step later, so nobody waits.
    """

    def __init__(self) -> None:
        self._is_alone = jax.process_count() == 1
        self._mesh = Mesh(np.asarray(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def cast(self, is_asked: bool) -> bool:
        """Votes once a step; True once some process voted so, at this step or, among several, at the one before."""
        if self._is_alone:
            return is_asked
        every = NamedSharding(self._mesh, PartitionSpec("devices"))
        votes = jax.make_array_from_callback((self._mesh.size,), every, lambda index: np.full(1, is_asked))
        last, self._last = self._last, self._any(votes)
        return last is not None and bool(last)


def gather_to_first(tree: Any) -> Any:
    """`tree` with its arrays whole, in the host memory of process 0; None elsewhere. Every process takes part.

    Beyond the result, a device holds one whole array at a time.
    """
    if jax.process_count() == 1:
        return tree
    arrays, structure = jax.tree.flatten(tree)
    host = jax.local_devices(backend="cpu")[0]
    whole = []
    for array in arrays:
        gathered = multihost_utils.process_allgather(array, tiled=True)
        if is_first():
            whole.append(jax.device_put(gathered, host))
    return jax.tree.unflatten(structure, whole) if is_first() else None


def end_promptly(run: Callable[[], int]) -> int:
    """The exit code that `run` returns; but one of several processes that fails ends here and now.

    Left to itself, it would first wait minutes for the others, at JAX's closing barrier, while they wait for it.
    """
    try:
        code = run()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if 0 < code < 128 and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            time.sleep(2)  # what it told the others last (`from_first`) is read from this very process
        os._exit(code)
    return code
