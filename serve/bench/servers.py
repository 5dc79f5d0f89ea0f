"""Servers of this project, one per method, started for a benchmark and stopped after it."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
from tqdm import tqdm

from serve.bench.client import Endpoint, auth

STOP_TIMEOUT_S = 20.0


@contextlib.contextmanager
def started_servers(
    strides: Sequence[str],
    arguments: Sequence[str],
    *,
    log_folder: Path,
    api_key: str | None,
    timeout_s: float,
) -> Iterator[list[Endpoint]]:
    """Runs `python -m serve ARGUMENTS --stride N --branches B`, or `--rows R`, for every N, NxB or NrR, side by side.

    Yields them when all are ready. "auto" is the stride and the branches that the server chooses; two-pass-N and
    block-L are what ISD is compared with. What they print is in `server_<name>.log`. Their environment is this
    process's, and so is the key they ask for.

    Raises:
        ValueError: one ended, or was not ready within `timeout_s`.
    """
    # Several processes would each reserve most of an accelerator's memory; without it they share.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ} if len(strides) > 1 else dict(os.environ)
    if api_key is not None:
        environment["IDLM_API_KEY"] = api_key
    processes: list[subprocess.Popen[bytes]] = []
    endpoints = []
    try:
        for stride, port in zip(strides, _free_ports(len(strides)), strict=True):
            endpoints.append(Endpoint(name_of(stride), f"http://127.0.0.1:{port}/v1"))
            command = [sys.executable, "-m", "serve", *arguments, *flags_of(stride), "--port", str(port)]
            with _log_of(endpoints[-1], log_folder).open("wb") as log:
                # In a session of its own: Ctrl-C in the terminal is for the benchmark, which then stops its servers.
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            processes.append(process)
        for endpoint, process in zip(endpoints, processes, strict=True):
            _wait_until_ready(endpoint, process, _log_of(endpoint, log_folder), auth(api_key), timeout_s)
        yield endpoints
    finally:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def name_of(stride: str) -> str:
    """What a server is called in tables."""
    return stride if stride.startswith(("two-pass-", "block-")) else f"stride-{stride}"


def flags_of(stride: str) -> list[str]:
    """Flags of a server for N, NxB, NrR, auto, two-pass-N or block-L.

    Raises:
        ValueError: it is none of these.
    """
    if baseline := re.fullmatch(r"(two-pass|block)-(\d+)", stride):
        kind, size = baseline.groups()
        if kind == "two-pass":
            return ["--method", "two-pass", "--stride", size]
        return ["--method", "block-diffusion", "--block-length", size]
    if stride == "auto":
        return ["--stride", "auto", "--branches", "auto"]
    match = re.fullmatch(r"(\d+)(?:(x|r)(\d+))?", stride)
    if match is None:
        raise ValueError(
            f"--strides: {stride!r} is neither a stride, nor one with branches as in 4x2 or rows as in 8r15, nor auto, "
            "two-pass-N or block-L"
        )
    most, kind, count = match.groups()
    return ["--stride", most, "--rows" if kind == "r" else "--branches", count or "1"]


def _log_of(endpoint: Endpoint, folder: Path) -> Path:
    return folder / f"server_{endpoint.name}.log"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:  # all held together, so that they differ
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _wait_until_ready(
    endpoint: Endpoint, process: subprocess.Popen[bytes], log: Path, headers: dict[str, str], timeout_s: float
) -> None:
    url = endpoint.url.removesuffix("/v1") + "/health"
    deadline = time.monotonic() + timeout_s
    with tqdm(bar_format="{desc} ({elapsed}) {postfix}", desc=f"starting {endpoint.name}") as bar:
        while True:
            if process.poll() is not None:
                raise ValueError(f"the server of {endpoint.name} ended with {process.returncode}: {_last_words(log)}")
            try:
                if httpx2.get(url, headers=headers, timeout=5).status_code == 200:
                    return
            except httpx2.TransportError:
                pass  # it listens once its programs are compiled
            if time.monotonic() > deadline:
                raise ValueError(f"{endpoint.name} was not ready after {timeout_s:g} s: {_last_words(log)}")
            bar.set_postfix_str(_last_words(log)[:80])
            time.sleep(0.5)


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it has printed nothing")
