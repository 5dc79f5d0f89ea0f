"""The server's process: started, looked at through /proc, stopped as an operator would."""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_READY = re.compile(rb"ready: (http://[^/]+)/v1")
_BAD_LINE = re.compile(r" (ERROR|CRITICAL) |^Traceback |^[\w.]*(Error|Exception)\b")


class Server(NamedTuple):
    """A running one.

    Attributes:
        process: in a session of its own, so that Ctrl-C is for whoever started it.
        url: without "/v1".
        log: what it has printed.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path


class Process(NamedTuple):
    """What /proc says of it."""

    resident_bytes: int
    num_files: int
    num_threads: int


class Sample(NamedTuple):
    """The server at one moment: its process, and what it says of itself."""

    at_s: float
    resident_bytes: int
    num_files: int
    num_threads: int
    num_running: int
    num_waiting: int
    num_free_pages: int
    num_cached_pages: int
    num_preemptions: int
    num_committed: int


@contextlib.contextmanager
def started(arguments: Sequence[str], log: Path, timeout_s: float = 1800.0) -> Iterator[Server]:
    """Runs `python -m serve ARGUMENTS` on a free port; kills it at the end if nobody has stopped it.

    Raises:
        ValueError: it ended, or was not ready in time.
    """
    command = [sys.executable, "-m", "serve", *arguments, "--port", "0"]
    environment = {"PYTHONUNBUFFERED": "1", **os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + timeout_s
        while (found := _READY.search(log.read_bytes())) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                how = f"ended with {process.returncode}" if process.poll() is not None else f"took over {timeout_s:g} s"
                words = log.read_text(errors="replace").replace("\r", "\n").split("\n")
                raise ValueError(f"the server {how}: {next((line for line in reversed(words) if line.strip()), '')}")
            time.sleep(0.2)
        yield Server(process, found[1].decode(), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def terminate(server: Server) -> None:
    """SIGTERM: it takes no more connections, and what runs may finish."""
    server.process.send_signal(signal.SIGTERM)


def look_at(server: Server) -> Process:
    """What /proc says now.

    Raises:
        FileNotFoundError: it is gone.
    """
    folder = Path("/proc") / str(server.process.pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Process(int(status["VmRSS"].split()[0]) * 1024, len(os.listdir(folder / "fd")), int(status["Threads"]))


def sample(server: Server, stats: dict[str, Any], at_s: float) -> Sample:
    """The process, together with `stats` of /get_server_info."""
    told = {name: stats[name] for name in Sample._fields if name in stats}
    return Sample(at_s, *look_at(server), **told)


def bad_lines(log: str) -> list[str]:
    """Lines of a server's log that should not be there: errors, and the beginning of tracebacks."""
    return [line for line in log.splitlines() if _BAD_LINE.search(line)]


def growth(samples: Sequence[Sample]) -> float:
    """Resident memory of the last third of the run over that of the middle third, in medians, less one.

    The first third warms up: allocators, caches and threads find their size. What leaks goes on to grow.

    Raises:
        ValueError: too little was seen.
    """
    start = samples[0].at_s if samples else 0.0
    seconds = samples[-1].at_s - start if samples else 0.0
    middle = [each.resident_bytes for each in samples if 1 / 3 <= (each.at_s - start) / max(seconds, 1e-9) < 2 / 3]
    last = [each.resident_bytes for each in samples if (each.at_s - start) / max(seconds, 1e-9) >= 2 / 3]
    if min(len(middle), len(last)) < 3:
        raise ValueError(f"{len(samples)} samples of memory are too few to compare")
    return statistics.median(last) / statistics.median(middle) - 1
