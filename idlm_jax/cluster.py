"""Several processes as one program: how they find each other, and what process 0 tells the others.

The rest is JAX's: every process runs the same program, and an array is one array wherever its parts lie. One process
needs none of this.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # its client is the one way to wait without a device; Orbax reaches for it too

_DAY_MS = 24 * 3600 * 1000  # the longest wait for process 0: it may be tokenizing a corpus


class ClusterError(ValueError):
    """The processes are named wrongly, there is no cluster to detect, or process 0 has failed."""


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
        ClusterError: some but not all of the three are given, or they do not fit together, or JAX finds no cluster.
        ConnectionError: process 0 does not answer in time. (Should another one be missing, JAX aborts the process.)
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if is_detected and len(missing) < len(given):
        raise ClusterError(f"--distributed has JAX find {', '.join(given)}: give either it or them")
    if not is_detected:
        if len(missing) == len(given):
            return
        if coordinator is None or num_processes is None or process_id is None:
            raise ClusterError(f"{', '.join(given)} belong together: {', '.join(missing)} not given")
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
            raise ClusterError(
                f"--distributed: JAX finds no SLURM step, Open MPI, Kubernetes job or Cloud TPU to use ({reason}); "
                f"name the processes with {', '.join(given)}"
            ) from error
        raise ConnectionError(f"process {process_id} of {num_processes} at {coordinator}: {reason}") from error


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ClusterError(f"--coordinator {coordinator} is not of the form HOST:PORT")
    if num_processes < 1:
        raise ClusterError(f"--num-processes {num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ClusterError(f"--process-id {process_id} must lie in 0..{num_processes - 1} (--num-processes)")


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


def first_host() -> str:
    """Where the others reach process 0."""
    address = distributed.global_state.coordinator_address
    assert address is not None
    return address.rpartition(":")[0]


def from_first(name: str, work: Callable[[], str]) -> str:
    """What `work` returns in process 0. The others wait for it, and fail when it fails.

    Args:
        name: of this moment; once in the life of the processes.
        work: called in process 0 alone. It may take long and use its devices, but no array that others hold a part of.

    Raises:
        ClusterError: `work` failed in process 0, where its own error is raised.
    """
    if jax.process_count() == 1:
        return work()
    client: Any = distributed.global_state.client
    key = f"idlm/{name}"
    if not is_first():
        outcome = client.blocking_key_value_get(key, _DAY_MS)
        if outcome.startswith("-"):
            raise ClusterError(f"process 0 failed: {outcome[1:]}")
        return outcome[1:]
    try:
        result = work()
    except BaseException as error:
        client.key_value_set(key, f"-{error}")
        raise
    client.key_value_set(key, f"+{result}")
    return result


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
