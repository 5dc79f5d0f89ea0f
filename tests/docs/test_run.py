"""What the documents print runs: `bash` and `python` blocks of a page, in order, in a clean copy of the checkout."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks, pages

PORT = 30000  # the server's default, which the documents use
RUN = ("bash", "python")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted since
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.proof
@pytest.mark.parametrize(
    "page",
    [page for page in pages() if any(block.language in RUN for block in blocks(page))],
    ids=lambda page: page.stem,
)
def test_the_blocks_of_a_page_run(page: Path, checkout: Path):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
    }
    del environment["XLA_FLAGS"]  # the tests' own
    with contextlib.ExitStack() as servers:
        for block in blocks(page):
            if block.language not in RUN:
                continue
            command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            if block.options:
                servers.enter_context(_running([*command, block.body], checkout, environment))
            else:
                _run([*command, block.body], block, checkout, environment)


def _run(command: list[str], block: Block, checkout: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{block.page}:{block.line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@contextlib.contextmanager
def _running(command: list[str], checkout: Path, environment: dict[str, str]) -> Iterator[None]:
    """A block "in another terminal": a server, from when it answers."""
    server = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            assert server.poll() is None, f"{command[-1]} ended with {server.returncode}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), timeout=1):
                break
            time.sleep(1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=120)
