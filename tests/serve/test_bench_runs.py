"""The load generator at work: on a small server on loopback, as a command, and with servers that it starts."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import uvicorn

import serve.bench.__main__ as command
from serve.bench.client import Answer, Client, Endpoint, Failure, Sampling
from serve.bench.load import Closed
from serve.bench.rounds import Run, run_rounds
from serve.bench.servers import flags_of, name_of, started_servers
from tests.serve.fake_openai import FIRST_TOKEN_S, FakeServer

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling(max_tokens=4, temperature=0.0, top_p=1.0, ignore_eos=False, seed=0)


@pytest.fixture(scope="module")
def listening() -> Iterator[FakeServer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fake = FakeServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield fake
        server.should_exit = True
        thread.join()


@pytest.fixture
def fake(listening: FakeServer) -> FakeServer:
    listening.asked.clear()
    return listening


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """Calls the command as a terminal does."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("IDLM_API_KEY", raising=False)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    def write(*texts: str) -> Path:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(texts))
        return path

    return write


def test_every_target_gets_the_same_prompts_and_no_round_those_of_another(fake: FakeServer):
    runs: list[Run] = []

    async def run() -> None:
        clients = [
            Client(Endpoint(name, f"{fake.url}/v1"), name, SAMPLING, api_key="k", timeout_s=10.0) for name in "xy"
        ]
        async with clients[0], clients[1]:
            sizes = {"num_rounds": 1, "num_prompts": 3, "seed": 0}
            prompts = [f"prompt {number}" for number in range(6)]
            await run_rounds(clients, [Closed(1)], prompts, runs, on_record=lambda run: None, **sizes)

    asyncio.run(run())
    asked = [(body["model"], int(body["prompt"].split()[1])) for body in fake.asked]
    first, second = (0, 1, 2), (3, 4, 5)
    expected = (("y", first), ("x", first), ("x", second), ("y", second))
    assert asked == [(name, prompt) for name, prompts in expected for prompt in prompts]
    assert {body["authorization"] for body in fake.asked} == {"Bearer k"}
    assert [(run.target, run.round, run.first, run.is_complete) for run in runs] == [
        ("y", 0, 0, True), ("x", 0, 0, True), ("x", 1, 3, True), ("y", 1, 3, True),
    ]  # fmt: skip
    # Connections are used again: a stream was read to its very end.
    assert len({body["client"] for body in fake.asked}) == 2


# One request


def ask(fake: FakeServer, prompt: str | list[dict[str, str]], *, late_s: float = 0.0, timeout_s: float = 10.0):
    async def run() -> Answer | Failure:
        async with Client(Endpoint("x", f"{fake.url}/v1"), "m", SAMPLING, api_key=None, timeout_s=timeout_s) as client:
            now = time.perf_counter()
            return await client.ask(prompt, number=3, seed=0, due=now - late_s, began=now - 1.0)

    return asyncio.run(run())


@pytest.mark.parametrize("prompt", ["hello", [{"role": "user", "content": "hello"}]])
def test_an_answer_and_its_times(fake: FakeServer, prompt: str | list[dict[str, str]]):
    answer = ask(fake, prompt, late_s=0.5)
    assert isinstance(answer, Answer)
    # The empty opening is no token, and a separator of Unicode inside the text ends no event.
    assert (answer.number, answer.num_chunks, answer.text) == (3, 4, "word\u2028" * 4)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (5, 1, 4)
    assert (answer.num_forwards, answer.verified_by_depth, answer.accepted_by_depth) == (2, [4, 2, 0], [2, 1, 0])
    assert answer.finish_reason == "length"
    # Time counts from when it was due.
    assert 0.5 + FIRST_TOKEN_S <= answer.ttft_s <= answer.latency_s
    assert answer.late_s >= 0.5 and answer.due_s == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("prompt", "kind", "detail"),
    [
        ("refuse", "HTTP 503", "busy"),
        ("break", "error in the stream", "the engine failed"),
        ("cut", "stream ended early", "finish_reason"),
        ("silent", "no usage", "include_usage"),
        ("hang", "TimeoutError", "within 0."),
    ],
)
def test_a_failure_says_of_which_kind_it_is(fake: FakeServer, prompt: str, kind: str, detail: str):
    failure = ask(fake, prompt, timeout_s=0.3 if prompt == "hang" else 10.0)
    assert isinstance(failure, Failure)
    assert failure.kind == kind and detail in failure.detail


def test_a_server_that_is_gone_is_a_failure():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    failure = ask(FakeServer(f"http://127.0.0.1:{port}"), "hello")
    assert isinstance(failure, Failure) and failure.kind == "ConnectError"


# The command


def test_two_targets_from_command_line_to_report(fake: FakeServer, bench, prompts, tmp_path: Path):
    out = tmp_path / "out"
    ended = bench(
        "--target", f"own={fake.url}/v1", "--target", f"other={fake.url}/other/v1/", "--model", "m",
        "--prompts", prompts("one", "differ", "three", "four"), "--concurrency", "1,2", "--num-prompts", 4,
        "--rounds", 2, "--max-tokens", 4, "--compare-texts", "--out", out, "--note", "a fake", "--api-key", "secret",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert len(fake.asked) == 2 * 2 * 3 * 4
    result = json.loads((out / "result.json").read_text())
    assert [(run["load"], run["target"], run["round"]) for run in result["runs"]][:4] == [
        ("closed 1", "other", 0), ("closed 1", "own", 0), ("closed 1", "own", 1), ("closed 1", "other", 1),
    ]  # fmt: skip
    assert {len(run["records"]) for run in result["runs"]} == {4}
    own, other = result["measures"][:2]
    assert (own["tokens_per_forward"], own["acceptance_by_depth"]) == (2.0, [0.5, 0.5])
    assert (other["tokens_per_forward"], other["acceptance_by_depth"]) == (None, None)
    assert own["ttft_s"]["p50"] >= FIRST_TOKEN_S and own["num_answers"] == 8
    assert [(each["target"], each["num_rounds"]) for each in result["ratios"]] == [("own", 2)] * 2
    # One of four prompts, in the warm-up too.
    assert [(each["num_compared"], each["num_different"]) for each in result["texts"]] == [(12, 3)] * 2
    assert result["options"]["num_prompts"] == 4 and result["machine"]["cores"]
    report = (out / "report.md").read_text()
    for expected in ("a fake", "| closed 2 | own |", "tokens/forward", "own: `m` at", "![", "asked again"):
        assert expected in report
    assert "secret" not in report + json.dumps(result)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Throughput" in ended.out and "Completions that differ from those of other" in ended.out
    again = bench("--target", f"{fake.url}/v1", "--prompts", prompts("one"), "--out", out)
    assert again.code == 2 and "holds a result already" in again.err


def test_failures_are_told_and_end_in_exit_code_1(fake: FakeServer, bench, prompts):
    ended = bench(
        "--target", f"{fake.url}/v1", "--prompts", prompts("one", "refuse", "cut"), "--mode", "burst",
        "--num-prompts", 3, "--rounds", 1, "--chat", "--max-tokens", 1,
    )  # fmt: skip
    assert ended.code == 1
    assert "HTTP 503" in ended.out and "stream ended early" in ended.out and "busy" in ended.out
    assert "no answer had two tokens" in ended.out


def test_ctrl_c_reports_what_was_finished(fake: FakeServer, prompts, tmp_path: Path):
    arguments = ["--target", f"{fake.url}/v1", "--prompts", prompts("one", "two", "three", "hang"), "--rounds", "1"]
    arguments += ["--concurrency", "2", "--num-prompts", "3", "--max-tokens", "4", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.bench", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    # The warm-up takes three prompts, round 1 begins with the one that hangs, and one and two are answered beside it.
    while len(fake.asked) < 6 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Interrupted: closed 2 on 127.0.0.1" in out and "round 1, after 2 requests" in out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["was_interrupted"] and [len(run["records"]) for run in result["runs"]] == [3, 2]
    assert result["measures"][0]["num_answers"] == 2 and not result["measures"][0]["is_complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --target [NAME=]URL, or --model-path"),
        (["--target", "localhost:30000"], "with a URL as in http://"),
        (["--target", "x=ftp://host/v1"], "with a URL as in http://"),
        (["--target", "x=http://h/v1", "--target", "x=http://i/v1"], "different names, got x, x"),
        (["--target", "x=http://h/v1", "--baseline", "y"], "--baseline 'y' is none of the targets x"),
        (["--target", "x=http://h/v1"], "give --prompts FILE"),
        (["--target", "x=http://h/v1", "--prompts", "/nowhere"], "/nowhere"),
        (["--target", "x=http://h/v1", "--concurrency", "1,x"], "--concurrency '1,x' must be numbers"),
        (["--target", "x=http://h/v1", "--concurrency", "4,4"], "names a number twice"),
        (["--target", "x=http://h/v1", "--concurrency", "0"], "must be at least 1"),
        (["--target", "x=http://h/v1", "--rate", "2"], "--mode poisson takes --rate, and no other does"),
        (["--target", "x=http://h/v1", "--mode", "poisson"], "--mode poisson takes --rate"),
        (["--target", "x=http://h/v1", "--mode", "poisson", "--rate", "-1"], "must be positive"),
        (["--target", "x=http://h/v1", "--mode", "burst", "--concurrency", "2"], "belongs to --mode closed"),
        (["--target", "x=http://h/v1", "--mode", "storm"], "'storm'"),
        (["--target", "x=http://h/v1", "--strides", "4"], "belong to --model-path"),
        (["--target", "x=http://h/v1", "--compare-texts"], "at least two targets"),
        (["--model-path", "m", "--compare-texts", "--temperature", "1"], "takes --temperature 0"),
        (["--model-path", "m", "--strides", "4,fast"], "'fast' is neither a stride"),
        (["--target", "x=http://h/v1", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
    ],
)
def test_wrong_usage_is_refused_in_a_line(bench, arguments: list[str], message: str):
    ended = bench(*arguments)
    assert ended.code == 2
    assert message in ended.err and "Traceback" not in ended.err and ended.out == ""


def test_a_server_that_cannot_be_asked_for_its_model_is_named(fake: FakeServer, bench, prompts):
    for target, message in (
        (f"x={fake.url}/other/v1", "x offers ['a', 'b']: choose with --model"),
        (f"x={fake.url}", "answered 404: does the address end in /v1?"),
        ("x=http://127.0.0.1:9/v1", "cannot reach x at http://127.0.0.1:9/v1/models"),
    ):
        ended = bench("--target", target, "--prompts", prompts("one"))
        assert ended.code == 2 and message in ended.err


def test_the_load_generator_does_not_import_jax():
    # It would take memory of the accelerator that the server needs, and seconds.
    code = "import sys, serve.bench.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Servers of this project: a package of the same name in the working directory stands for the real one.

STAND_IN = """
import http.server, json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["--stride"] == "3":
    sys.exit("stride 3 is not served")
with open(f"stand_in_{options['--stride']}", "w") as file:
    json.dump([os.getpid(), options, os.environ.get("IDLM_API_KEY")], file)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "__init__.py").touch()
    (tmp_path / "serve" / "__main__.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_started_servers_get_their_arguments_and_are_stopped(stand_in: Path):
    how = {"log_folder": stand_in, "api_key": "secret", "timeout_s": 20.0}
    ids = []
    with started_servers(["4x2", "1", "auto"], ["--model-path", "m"], **how) as endpoints:
        assert [endpoint.name for endpoint in endpoints] == ["stride-4x2", "stride-1", "stride-auto"]
        for stride, branches, endpoint in zip(("4", "1", "auto"), ("2", "1", "auto"), endpoints, strict=True):
            process_id, options, key = json.loads((stand_in / f"stand_in_{stride}").read_text())
            assert endpoint.url == f"http://127.0.0.1:{options['--port']}/v1"
            assert (options["--model-path"], options["--branches"], key) == ("m", branches, "secret")
            assert is_alive(process_id)
            ids.append(process_id)
    assert not any(map(is_alive, ids))


def test_what_isd_is_compared_with_has_flags_of_its_own():
    assert flags_of("two-pass-3") == ["--method", "two-pass", "--stride", "3"]
    assert flags_of("block-8") == ["--method", "block-diffusion", "--block-length", "8"]
    assert flags_of("8r15") == ["--stride", "8", "--rows", "15"]
    assert [name_of(each) for each in ("two-pass-3", "block-8", "4x2")] == ["two-pass-3", "block-8", "stride-4x2"]


def test_a_server_that_does_not_start_is_quoted_and_the_others_are_stopped(stand_in: Path):
    how = {"log_folder": stand_in, "api_key": None, "timeout_s": 20.0}
    with pytest.raises(ValueError, match="stride-3 ended with 1: stride 3 is not served"):
        with started_servers(["4", "3"], ["--model-path", "m"], **how):
            raise AssertionError("it started")
    process_id, *_ = json.loads((stand_in / "stand_in_4").read_text())
    assert not is_alive(process_id)
