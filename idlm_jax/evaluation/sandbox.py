"""Where programs that a model wrote may run: no network but the model server, nothing writable but one folder.

The harness that runs them is inside too, because it runs them as its own children; it must reach the server. So the
sandbox has a loopback of its own, on which a relay outside listens and forwards to that one server.

What this is not: a virtual machine. Files that the user may read can be read, the kernel is shared, and the server's
whole API can be called. docs/evaluation.md says it to users.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

PORT = 30000  # on the sandbox's own loopback, which has no other
TEMPORARY = "/dev/shm"  # where every Linux has a file system in memory; the sandbox gets one of its own
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
START_TIMEOUT_S = 60.0
# All of the caller's environment that gets in. Keys and tokens do not.
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of each process inside; `setrlimit`'s.

    Attributes:
        memory_bytes: of address space.
        file_bytes: of each written file.
        cpu_s: of processor time; a backstop, for the harness times each test by itself.
        num_processes: of the sandbox's user; not applied to root by Linux.
        num_files: open at once.
    """

    memory_bytes: int = 8 << 30
    file_bytes: int = 1 << 30
    cpu_s: int = 6 * 3600
    num_processes: int = 1024
    num_files: int = 4096


def why_not_isolated() -> str | None:
    """What keeps this machine from isolating a process; None if nothing does."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    try:
        tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=START_TIMEOUT_S)
    except FileNotFoundError:
        return "there is no unshare (util-linux)"
    return None if tried.returncode == 0 else tried.stderr.strip() or f"unshare ended with {tried.returncode}"


@contextlib.contextmanager
def sandboxed(
    command: Sequence[str],
    server: tuple[str, int],
    folder: Path,
    *,
    environment: Mapping[str, str],
    limits: Limits,
    is_isolated: bool,
    output: int | IO[bytes],
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a command in the sandbox and relays its connections to the server until it ends.

    Args:
        command: asks the server at `http://127.0.0.1:{PORT}` if isolated, else where it is.
        server: host and port that the sandbox may reach, over plain TCP.
        folder: the working directory and home; but for temporary files the one place that can be written.
        environment: added to the few variables that are passed on.
        limits: of each process.
        is_isolated: False keeps the network and the file system, and applies limits and environment alone.
        output: what the command prints, errors too; as for `subprocess.Popen`.

    Raises:
        OSError: the doors could not be shut; nothing ran.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    ours, theirs = socket.socketpair()
    with ours, contextlib.ExitStack() as stack:
        # Isolated, temporary files are in memory of the sandbox's own. The path is short either way: sockets of
        # multiprocessing lie there, and theirs may have 107 characters.
        temporary = TEMPORARY if is_isolated else stack.enter_context(tempfile.TemporaryDirectory(prefix="idlm-"))
        home = {"HOME": str(folder), "TMPDIR": temporary, "PYTHONDONTWRITEBYTECODE": "1"}
        settings = {
            "is_isolated": is_isolated,
            "channel": theirs.fileno(),
            "port": PORT,
            "writable": str(folder),
            "temporary": temporary,
            "limits": dataclasses.asdict(limits),
        }
        init = [sys.executable, "-I", str(Path(__file__).with_name("sandbox_init.py")), json.dumps(settings)]
        with theirs:
            process = subprocess.Popen(
                [*(UNSHARE if is_isolated else ()), *init, *command],
                cwd=folder,
                env={**kept, **home, **environment},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that all can be ended together, where no namespace does it
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        with process:  # closes its pipes, and waits
            try:
                if is_isolated:
                    stack.enter_context(_relay(_receive_listener(ours), server))
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # --kill-child: everything inside goes with it


def _receive_listener(channel: socket.socket) -> socket.socket:
    channel.settimeout(START_TIMEOUT_S)
    _, descriptors, _, _ = socket.recv_fds(channel, 64, 1)
    if not descriptors:
        raise OSError("the sandbox ended before it was shut; its log says why")
    return socket.socket(fileno=descriptors[0])


@contextlib.contextmanager
def _relay(listener: socket.socket, server: tuple[str, int]) -> Iterator[None]:
    """Accepts on a socket of the sandbox's network and forwards bytes to the server, in a thread."""
    loop = asyncio.new_event_loop()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*server)
        except OSError:
            writer.close()  # the client sees a closed connection, as from a server that is down
            return
        await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))

    async def serve(ended: asyncio.Event) -> None:
        async with await asyncio.start_server(forward, sock=listener):
            await ended.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    ended = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=[serve(ended)], name="relay")
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
