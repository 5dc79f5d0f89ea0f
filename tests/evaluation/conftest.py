"""A server that answers what the driver itself asks, and programs that stand for the harnesses."""

import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

COUNTED = """# HELP idlm:generation_tokens_total Tokens committed.
idlm:generation_tokens_total{{model_name="a b"}} {tokens}.0
idlm:request_forwards_total{{model_name="a b"}} {forwards}.0
idlm:spec_decode_num_verified_tokens_total{{model_name="a b"}} 4.0e+01
idlm:spec_decode_num_accepted_tokens_total{{model_name="a b"}} {accepted}.0
"""


class FakeServer(http.server.ThreadingHTTPServer):
    """Each reading of `/metrics` is ten forwards later; chats are answered by `answer`."""

    readings = 0
    counts = True

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[str], str] = lambda prompt: prompt

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        text = json.dumps({"data": [{"id": "fake"}]})
        if self.path == "/metrics":
            n = self.server.readings = self.server.readings + 1
            text = COUNTED.format(tokens=25 * n, forwards=10 * n, accepted=3 * n) if self.server.counts else "up 1\n"
        known = self.path in ("/metrics", "/v1/models")
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(text.encode() if known else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        message = {"role": "assistant", "content": self.server.answer(body["messages"][-1]["content"])}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "fake", "choices": choices}
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply | {"usage": usage}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(("127.0.0.1", 0), Handler) as fake:
        thread = threading.Thread(target=fake.serve_forever)
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def harness(tmp_path_factory) -> Path:
    """One program for both; it has no environment, so its version cannot be told."""
    program = tmp_path_factory.mktemp("harness") / "harness"
    source = Path(__file__).with_name("fake_harness.py")
    program.write_text(f"#!{sys.executable}\n{source.read_text()}")
    program.chmod(0o755)
    return program
