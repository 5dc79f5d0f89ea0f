"""Bad clients, a bad device, too few pages and a bad moment: what the others notice over HTTP, which is nothing."""

import concurrent.futures
import dataclasses
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

import idlm_jax
from idlm_jax.model.language_model import LanguageModel
from serve.device import Device
from serve.runs import ReadLater
from tests.serve.http_server import CONFIG, KEY, MAX_BODY, MODEL, Running, serving
from tests.serve.test_faults import poll

# Three pages, of which two longer requests want two each.
TIGHT = dataclasses.replace(CONFIG, num_pages=4)
LONG = 90
PROMPTS = ["def __init__(self, ", "import os\n", "for name in ", "class Parser:\n    def "]
HUNDRED_MB = 100 * 2**20


class Moody:
    """A device that hangs while `may_go` is not set, and whose `fails_in`-th decode from now on fails."""

    def __init__(self, device: Device):
        self.device = device
        self.may_go = threading.Event()
        self.may_go.set()
        self.hangs, self.fails_in = threading.Event(), 0

    def decode(self, *step: Any) -> ReadLater:
        if not self.may_go.is_set():
            self.hangs.set()
            assert self.may_go.wait(60)
            self.hangs.clear()
        self.fails_in -= 1
        if self.fails_in == 0:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return self.device.decode(*step)

    def prefill(self, *step: Any) -> ReadLater:
        return self.device.prefill(*step)

    def reset(self) -> None:
        self.device.reset()


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return idlm_jax.load(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def compiled(lm) -> Device:
    return Device(lm, TIGHT)


@pytest.fixture
def moody(compiled) -> Iterator[Moody]:
    compiled.reset()
    moody = Moody(compiled)
    yield moody
    moody.may_go.set()


@pytest.fixture
def server(lm, moody) -> Iterator[Running]:
    """It wants all its pages back at the end."""
    with serving(TIGHT, lm=lm, device=moody, watchdog_s=0.3, health_timeout_s=0.3) as running:
        yield running


def ask(server: Running, index: int, max_tokens: int = 24, **extra: Any) -> str:
    """A greedy completion, or one with a seed."""
    body = {"prompt": PROMPTS[index], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **extra}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def read(server: Running, index: int, on_first: Callable[[], None] = lambda: None, **extra: Any) -> tuple[str, str]:
    """The text of a stream, and why it ended: a finish reason, or the message of an error."""
    body = {"prompt": PROMPTS[index], "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True, **extra}
    text, end = "", ""
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        for line in filter(None, answer.iter_lines()):
            on_first()
            if line == "data: [DONE]":
                return text, end
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                end = event["error"]["message"]
            else:
                text, end = text + event["choices"][0]["text"], event["choices"][0]["finish_reason"] or end
    return text, "broke off"


def head(length: int | None, path: str = "/v1/completions") -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    fields = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n{size}"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode()


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_idle(server: Running) -> bool:
    stats = server.engine.stats()
    return stats.num_running + stats.num_waiting == 0 and stats.num_free_pages == TIGHT.num_pages - 1


# ---- clients


def test_a_hundred_megabytes_that_are_announced_are_refused_before_they_are_sent(server):
    with connect(server) as connection:
        connection.sendall(head(HUNDRED_MB))
        answer = b""
        while piece := connection.recv(10_000):  # up to the end: the server hangs up
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"exceeds 100,000 bytes" in answer


def test_a_hundred_megabytes_that_are_not_announced_are_not_read_to_their_end(server):
    piece, num_sent, answer = b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 0, b""
    with connect(server) as connection:
        connection.sendall(head(None))
        try:
            while num_sent < HUNDRED_MB:
                connection.sendall(piece)
                num_sent += len(piece)
        except OSError:
            pass  # it has hung up
        try:
            answer = connection.recv(10_000)
        except OSError:
            pass  # and what it said before may be lost with that
    assert num_sent < HUNDRED_MB / 5
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")
    assert MAX_BODY < num_sent


def test_a_client_who_sends_byte_by_byte_is_served_and_holds_up_nobody(server):
    expected = [ask(server, index) for index in range(2)]
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "ignore_eos": True}).encode()
    with connect(server) as connection:
        for place, byte in enumerate(head(len(body)) + body):
            connection.sendall(bytes([byte]))
            if place % 50 == 0:
                assert ask(server, 1) == expected[1]
        answer = connection.recv(100_000)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == expected[0]


def test_a_client_who_begins_and_goes_away_leaves_nothing(server):
    for content in (b"", b"POST /v1/comp", head(100), head(100) + b'{"prompt": ', head(None) + b"5\r\n{"):
        with connect(server) as connection:
            connection.sendall(content)
            # Reset instead of a polite end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert is_idle(server)
    assert read(server, 0) == (ask(server, 0), "length")


@pytest.mark.proof
@pytest.mark.slow
def test_one_who_does_not_read_his_stream_keeps_neither_pages_nor_anybody_else(server):
    expected = ask(server, 1)
    body = {"prompt": PROMPTS[0], "max_tokens": LONG, "ignore_eos": True, "stream": True, "n": 6, "logprobs": 5}
    content = json.dumps(body).encode()
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head(len(content)) + content)
        assert poll(lambda: server.engine.stats().num_running > 0)
        assert read(server, 1) == (expected, "length")
        assert poll(lambda: is_idle(server), within_s=60)  # with his stream still open
        assert server.engine.stats().finished == {"length": 8}
        assert ask(server, 1) == expected
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):  # all of it was kept for him
            answer += connection.recv(100_000)
    assert answer.count(b'"finish_reason": "length"') == 6
    assert b"data: [DONE]" in answer


# ---- the device


def test_a_failed_step_is_500_or_an_event_for_those_in_it_and_nothing_for_the_rest(server, moody):
    expected = [ask(server, index) for index in range(4)]
    moody.may_go.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        stream = threads.submit(read, server, 1)
        assert moody.hangs.wait(20)
        body = {"prompt": PROMPTS[0], "max_tokens": 24}
        whole = threads.submit(server.http.post, "/v1/completions", json=body)
        assert poll(lambda: server.engine.stats().num_waiting == 1)
        later = [threads.submit(read, server, index) for index in (2, 3)]
        assert poll(lambda: server.engine.stats().num_waiting == 3)
        # The first decode hangs, the second reads all of them in, and in the third the first two take part.
        moody.fails_in = 3
        moody.may_go.set()
        message = "a step failed: RuntimeError: RESOURCE_EXHAUSTED: out of memory"
        answer = whole.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
        assert answer.json()["error"]["message"] == message
        assert stream.result()[1] == message
        assert [each.result() for each in later] == [(expected[index], "length") for index in (2, 3)]
    assert [ask(server, index) for index in range(4)] == expected
    assert server.http.get("/health").status_code == 200


def test_health_is_503_while_the_device_hangs_and_200_when_it_is_back(server, moody):
    expected = ask(server, 0)
    moody.may_go.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        stream = threads.submit(read, server, 0)
        assert moody.hangs.wait(20)
        assert poll(lambda: server.http.get("/health").status_code == 503)
        answer = server.http.get("/health")
        assert "requests wait, and no step ended for" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        # Everything that needs no device is there.
        for path in ("/metrics", "/v1/models", "/get_server_info"):
            assert server.http.get(path).status_code == 200
        assert server.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
        answer = server.http.get("/health_generate")
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "no token within 0.3 s")
        moody.may_go.set()
        assert stream.result() == (expected, "length")
    assert poll(lambda: is_idle(server))
    assert server.http.get("/health").status_code == server.http.get("/health_generate").status_code == 200


# ---- too few pages, and the end


@pytest.mark.proof
@pytest.mark.slow
def test_who_is_preempted_for_lack_of_pages_gets_the_tokens_he_gets_alone(server):
    how = [{}, {"temperature": 1, "seed": 7}, {"temperature": 0.7, "top_p": 0.9, "seed": 8}, {}]
    alone = [ask(server, index, LONG, **each) for index, each in enumerate(how)]
    assert server.engine.stats().num_preemptions == 0
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        together = [threads.submit(read, server, index, max_tokens=LONG, **each) for index, each in enumerate(how)]
        assert [each.result() for each in together] == [(text, "length") for text in alone]
    assert server.engine.stats().num_preemptions > 0


def test_a_server_that_shuts_down_finishes_its_streams_and_takes_no_more(server, moody):
    expected = [ask(server, index) for index in range(2)]
    moody.may_go.clear()
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        streams = [threads.submit(read, server, index) for index in range(2)]
        assert moody.hangs.wait(20)
        server.uvicorn.should_exit = True  # as SIGTERM does

        def is_closed() -> bool:
            try:
                connect(server).close()
            except ConnectionRefusedError:
                return True
            return False

        assert poll(is_closed)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/health")
        moody.may_go.set()
        assert [each.result() for each in streams] == [(text, "length") for text in expected]
    assert poll(lambda: server.engine.failure == "the engine is closed")


def test_a_stream_that_outlasts_the_shutdown_is_cut_and_the_server_ends_even_if_its_device_does_not(lm, moody, caplog):
    with serving(TIGHT, lm=lm, device=moody, shutdown_s=1, close_timeout_s=0.5) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            moody.may_go.clear()
            stream = threads.submit(read, server, 0, max_tokens=LONG)
            assert moody.hangs.wait(20)
            started = time.monotonic()
            server.uvicorn.should_exit = True
            # Its reader is told by the connection's end.
            try:
                assert stream.result(timeout=20)[1] == "broke off"
            except httpx2.TransportError:
                pass
            assert 0.5 < time.monotonic() - started < 10
            assert poll(lambda: "the device did not come back within 0.5 s" in caplog.text)
            moody.may_go.set()
            assert server.engine.close(timeout_s=20.0)
    assert server.engine.failure == "the engine is closed"
