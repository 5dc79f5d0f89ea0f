"""One server over several processes: all make the calls of process 0, and its tokens are those of one device."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import idlm_jax
from idlm_jax.decoding import AR, SamplingParams, generate
from serve.device import Draws
from serve.hosts import Leader, follow
from serve.runs import ReadLater

ROOT = Path(__file__).parents[2]
MODEL = ("assets/tiny-qwen3-py", "assets/tiny-qwen3-py-isd")
WORDS = np.arange(6, dtype=np.int32).reshape(2, 3)


class Recorder:
    """A device that writes down what it is asked, and fails at the third step."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def decode(self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0) -> ReadLater:
        self.calls.append(("decode", words.tolist(), draws, masks is None, choice))
        return words

    def prefill(self, words: np.ndarray, masks: np.ndarray | None = None, choice: int = 0) -> ReadLater:
        self.calls.append(("prefill", words.tolist(), masks is None, choice))
        return words

    def reset(self) -> None:
        self.calls.append(("reset",))


@pytest.fixture
def signals() -> Iterator[None]:
    """`follow` lets the process ignore signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_followers_make_the_calls_of_the_leader_in_order_and_end_with_it(signals):
    ours, theirs = zip(*(Pipe() for _ in range(2)), strict=True)
    devices = Recorder(), Recorder(), Recorder()
    leader = Leader(devices[0], ours)
    masks = np.ones((2, 1, 1), np.uint32)
    outcome = leader.prefill(WORDS, masks)
    leader.decode(WORDS + 1, Draws.PLAIN)
    leader.reset()
    leader.decode(WORDS + 2, Draws.FULL, masks)
    assert np.asarray(outcome).tolist() == WORDS.tolist()
    for connection in ours:
        connection.close()
    for device, connection in zip(devices[1:], theirs, strict=True):
        follow(device, connection)
        assert device.calls == devices[0].calls and len(device.calls) == 4
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


class LateFailure:
    def __array__(self) -> np.ndarray:
        raise RuntimeError("the device is gone")


def test_a_follower_whose_step_failed_ends_and_the_leader_hears_of_it(signals):
    ours, theirs = Pipe()
    device = Recorder()
    device.decode = lambda *_: LateFailure()  # type: ignore[method-assign]
    leader = Leader(Recorder(), [ours])
    leader.decode(WORDS, Draws.GREEDY)
    leader.decode(WORDS, Draws.GREEDY)
    with theirs, pytest.raises(RuntimeError, match="the device is gone"):
        follow(device, theirs)
    with pytest.raises(OSError):
        leader.decode(WORDS, Draws.GREEDY)


@contextlib.contextmanager
def two_processes(tmp_path: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], str]]:
    """A server of two processes with one fake device each; yields them and the address, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "serve", "--model-path", MODEL[0], "--adapter", MODEL[1], "--dtype", "float32"]
    command += "--port 0 --tp-size 2 --nnodes 2 --max-running-requests 2 --chunked-prefill-size 32".split()
    command += [*"--max-total-tokens 4096 --max-logprobs -1 --no-extras --dist-init-addr".split(), coordinator]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_FLAGS", None)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                whole = [*command, "--node-rank", str(rank)]
                processes.append(subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=output, stderr=output))
        deadline = time.monotonic() + 500
        while (ready := re.search(r"ready: (http://[^/]+)/v1", logs[0].read_text())) is None:
            ended = [process.poll() for process in processes]
            assert ended == [None, None] and time.monotonic() < deadline, [log.read_text()[-2000:] for log in logs]
            time.sleep(0.2)
        yield processes, ready[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def complete(url: str, prompt: list[int], **wishes: Any) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 40, **wishes}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_answer_what_one_device_does_and_end_together(tmp_path):
    lm = idlm_jax.load(MODEL[0], adapter=MODEL[1], dtype="float32")
    prompts = [list(range(first, first + 12 + 9 * first % 30)) for first in (100, 300, 500, 700, 900)]
    expected = [each.text for each in generate(lm, prompts, AR(), SamplingParams(max_tokens=40))]
    with two_processes(tmp_path) as (processes, url):
        texts: dict[int, str] = {}

        def ask(index: int) -> None:
            texts[index] = complete(url, prompts[index], temperature=0)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [texts[index] for index in range(len(prompts))] == expected
        seeded = [complete(url, prompts[0], temperature=1, seed=7) for _ in range(2)]
        assert seeded[0] == seeded[1] != expected[0]
        # As a cluster does it: every process is told at once.
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [0, 0]


@pytest.mark.slow
@pytest.mark.proof
def test_a_server_whose_second_process_dies_does_not_go_on_as_if_nothing_had_happened(tmp_path):
    with two_processes(tmp_path) as (processes, url):
        assert complete(url, [100, 101, 102], temperature=0)
        processes[1].kill()
        with pytest.raises(OSError):
            complete(url, [100, 101, 102], temperature=0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert processes[0].wait(5) != 0
            return
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/health", timeout=10)
