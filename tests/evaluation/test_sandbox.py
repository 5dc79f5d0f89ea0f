"""What a program in the sandbox can do, told by programs in it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from idlm_jax.evaluation.sandbox import PORT, Limits, sandboxed, why_not_isolated

# Proofs, not default tests: user namespaces are not allowed in many containers, where `make test` must run too.
needs_namespaces = pytest.mark.proof


def run(server, folder: Path, code: str, *, is_isolated: bool = True, **limits: int) -> str:
    """What a program prints; its errors too."""
    with sandboxed(
        [sys.executable, "-c", code],
        ("127.0.0.1", server.server_port),
        folder,
        environment={"ADDED": "1"},
        limits=Limits(**limits),
        is_isolated=is_isolated,
        output=subprocess.PIPE,
    ) as process:
        said, _ = process.communicate(timeout=60)
    return said.decode()


@needs_namespaces
def test_this_machine_can_isolate():
    assert why_not_isolated() is None


@needs_namespaces
def test_it_reaches_the_server_and_no_other_address(server, tmp_path):
    code = f"""
import socket, urllib.request
print(urllib.request.urlopen("http://127.0.0.1:{PORT}/v1/models", timeout=5).read().decode())
for address in [("127.0.0.1", {server.server_port}), ("192.0.2.1", 80)]:
    try:
        socket.create_connection(address, timeout=5)
        print("connected")
    except OSError as error:
        print(error)
"""
    lines = run(server, tmp_path, code).splitlines()
    assert '"fake"' in lines[0]
    assert "refused" in lines[1] and "unreachable" in lines[2]


@needs_namespaces
def test_it_writes_in_its_folder_and_nowhere_else(server, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside.txt"
    outside.write_text("kept")
    code = f"""
import pathlib, tempfile
pathlib.Path("here.txt").write_text("written")
print(tempfile.gettempdir())
for act in ("write_text('gone')", "unlink()"):
    try:
        eval("pathlib.Path({str(outside)!r})." + act)
        print("done")
    except OSError as error:
        print(error.strerror)
"""
    lines = run(server, inside, code).splitlines()
    assert (inside / "here.txt").read_text() == "written" and outside.read_text() == "kept"
    assert lines == ["/dev/shm", "Read-only file system", "Read-only file system"]


@needs_namespaces
def test_processes_of_multiprocessing_talk_however_long_the_folders_path(server, tmp_path):
    folder = tmp_path / ("long" * 25)  # a socket's path has at most 107 characters
    code = """
import multiprocessing
with multiprocessing.Manager() as manager:
    print(list(manager.list([1, 2])))
"""
    assert [run(server, folder, code, is_isolated=each) for each in (True, False)] == ["[1, 2]\n"] * 2


@needs_namespaces
def test_temporary_files_are_gone_afterwards(server, tmp_path):
    before = set(Path("/dev/shm").iterdir())
    code = "import pathlib, tempfile; file = pathlib.Path(tempfile.mkdtemp()) / 'a'; file.write_text('b'); print(file)"
    files = [Path(run(server, tmp_path, code, is_isolated=each).strip()) for each in (True, False)]
    assert not any(file.exists() for file in files) and set(Path("/dev/shm").iterdir()) == before


@needs_namespaces
def test_it_sees_none_of_the_callers_variables_and_no_other_process(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = """
import os
print("HF_TOKEN" in os.environ, os.environ["ADDED"], sum(name.isdigit() for name in os.listdir("/proc")))
"""
    assert run(server, tmp_path, code) == "False 1 1\n"


@needs_namespaces
def test_memory_and_file_size_end_where_the_limits_are(server, tmp_path):
    code = """
try:
    bytearray(300 << 20)
except MemoryError:
    print("no memory")
try:
    open("large", "wb").write(bytes(2 << 20))
except OSError as error:
    print(error.strerror)
"""
    assert run(server, tmp_path, code, memory_bytes=256 << 20, file_bytes=1 << 20) == "no memory\nFile too large\n"


@pytest.mark.parametrize("is_isolated", [pytest.param(True, marks=needs_namespaces), False])
def test_what_a_program_leaves_running_ends_with_it(server, tmp_path, is_isolated):
    stays = "import time\nwhile True: open('alive', 'w').write('yes'); time.sleep(0.05)"
    code = f"""
import os, subprocess, sys, time
quiet = subprocess.DEVNULL
subprocess.Popen([sys.executable, "-c", {stays!r}], stdout=quiet, stderr=quiet)
while not os.path.exists("alive"):
    time.sleep(0.02)
"""
    run(server, tmp_path, code, is_isolated=is_isolated)
    alive = tmp_path / "alive"
    before = alive.stat().st_mtime_ns
    time.sleep(0.3)
    assert alive.stat().st_mtime_ns == before


def test_without_isolation_limits_and_variables_hold_still(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os, resource; print('HF_TOKEN' in os.environ, resource.getrlimit(resource.RLIMIT_CPU)[0])"
    assert run(server, tmp_path, code, is_isolated=False, cpu_s=77) == "False 77\n"


def test_doors_that_cannot_be_shut_are_an_error_and_nothing_runs(server, tmp_path, monkeypatch):
    monkeypatch.setattr("idlm_jax.evaluation.sandbox.UNSHARE", ("false",))
    with pytest.raises(OSError, match="the sandbox ended before it was shut"):
        run(server, tmp_path, "open('ran', 'w')")
    assert not (tmp_path / "ran").exists()
    assert why_not_isolated() == "unshare ended with 1"
    monkeypatch.setattr("idlm_jax.evaluation.sandbox.UNSHARE", ("no-such-unshare",))
    assert why_not_isolated() == "there is no unshare (util-linux)"
