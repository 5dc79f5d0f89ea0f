"""The soak: a short one on a server of its own, and what its parts take for a violation."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from benchmarks.soak.course import Outcome, soak
from benchmarks.soak.report import markdown, write
from benchmarks.soak.traffic import PROBES, Limits, Traffic
from benchmarks.soak.watch import Process, Sample, bad_lines, growth, started

# Few programs, and pages for less than two long requests.
SERVER = (
    "--model-path assets/tiny-qwen3-py --dtype float32 --max-running-requests 2 --max-queued-requests 4 --stride 3 "
    "--context-length 256 --max-total-tokens 320 --chunked-prefill-size 32 --max-logprobs -1 --max-body-mb 1"
).split()
SECONDS = 20.0
LIMITS = Limits(max_len=64, max_queued=2, max_running=2, max_body_bytes=1000)


@pytest.mark.proof
@pytest.mark.slow  # most of it compiles the server's programs, as users do
def test_after_random_traffic_everything_is_given_back(tmp_path):
    with started(SERVER, tmp_path / "log") as server:
        outcome = asyncio.run(
            soak(server, seconds=SECONDS, num_clients=8, pause_s=0.1, max_body_bytes=2**20, seed=1, max_growth=None)
        )
    assert outcome.violations == []
    assert outcome.num_free_pages == outcome.num_pages == 5
    assert (outcome.exit_code, outcome.growth) == (0, None)
    assert len(outcome.samples) > SECONDS / 3
    # It was no idle time.
    assert outcome.info["stats"]["num_preemptions"] > 0
    for answer in ("probe: 200", "schema: 200", "leave: left", "abort_request: 200", "refused: 400", "burst: 429"):
        assert outcome.counts[answer] > 0, answer


def samples(megabytes: list[float]) -> list[Sample]:
    return [Sample(float(at), int(each * 1e6), 9, 9, 0, 0, 0, 0, 0, 0) for at, each in enumerate(megabytes)]


def test_growth_compares_the_last_third_with_the_middle_and_forgives_the_first():
    warm_up = [100, 200, 300, 400, 500, 600]
    assert growth(samples([*warm_up, *[700] * 6, *[700] * 6])) == 0
    assert growth(samples([*warm_up, *[700] * 6, *[770] * 6])) == pytest.approx(0.1)
    # One spike is not growth.
    assert growth(samples([*warm_up, *[700] * 6, 700, 700, 5000, 700, 700, 700])) == 0


@pytest.mark.parametrize("num_samples", [0, 1, 7])
def test_growth_of_too_short_a_run_is_not_told(num_samples):
    with pytest.raises(ValueError, match=f"{num_samples} samples of memory are too few"):
        growth(samples([1.0] * num_samples))


def test_errors_and_tracebacks_are_found_in_a_log():
    log = """2026-11-22 19:57:56,070 INFO uvicorn.access: "POST /v1/completions HTTP/1.1" 429
2026-11-22 19:57:56,070 WARNING uvicorn.error: ERRORs were said
2026-11-22 19:57:57,071 ERROR serve.engine: a step failed
Traceback (most recent call last):
  File "x.py", line 1, in f
jaxlib.xla_client.XlaRuntimeError: RESOURCE_EXHAUSTED
"""
    found = [line.split(":")[0][:9] for line in bad_lines(log)]
    assert found == ["2026-11-2", "Traceback", "jaxlib.xl"]
    assert "a step failed" in bad_lines(log)[0]


class Liar(BaseHTTPRequestHandler):
    """Answers every completion with what it is told to."""

    answers: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        content = self.answers.pop(0).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def liar() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def whole(*texts: str, reason: str = "length") -> str:
    choices = [{"text": text, "finish_reason": reason} for text in texts]
    return json.dumps({"choices": choices, "usage": {"completion_tokens": 1}})


def ask(url: str, answers: list[str], *kinds: str, stream: bool = False) -> list[str]:
    """What the traffic finds wrong with these answers."""
    Liar.answers = answers

    async def run() -> list[str]:
        async with httpx2.AsyncClient(base_url=url) as http:
            traffic = Traffic(http, LIMITS, seed=0)
            traffic._maybe_stream = lambda: {"stream": stream}
            for kind in kinds:
                traffic._kinds = {getattr(traffic, kind): 1}
                await traffic.one()
            return traffic.violations

    return asyncio.run(run())


def test_an_answer_that_changes_is_a_violation(liar):
    first = [whole(*["a"] * body.get("n", 1)) for body in PROBES]
    assert ask(liar, first * 2, "learn", "learn") == []
    changed = [*first, *first[:2], whole("b"), *first[3:]]
    (violation,) = ask(liar, changed, "learn", "learn")
    assert violation.startswith("probe: {'prompt': 'import os")
    assert violation.endswith("gave ['a'] and now ['b']")


def test_json_that_breaks_its_schema_is_a_violation_unless_it_was_cut_off(liar):
    good, bad, half = '{"kind": "a", "is_on": true}', '{"kind": "c", "is_on": true}', '{"kind": '
    assert ask(liar, [whole(good, reason="stop")], "follow_a_schema") == []
    assert ask(liar, [whole(half, reason="length")], "follow_a_schema") == []
    assert "does not follow it" in ask(liar, [whole(bad, reason="stop")], "follow_a_schema")[0]
    assert "JSONDecodeError" in ask(liar, [whole(half, reason="stop")], "follow_a_schema")[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [("{}", "KeyError: 'usage'"), ("nonsense", "JSONDecodeError"), (whole("a", reason="error"), "ended with 'error'"),
     (whole("a", "b"), "2 choices, 1 asked for")],
)  # fmt: skip
def test_what_is_no_answer_is_a_violation(liar, answer, message):
    assert message in ask(liar, [answer], "follow_a_schema")[0]


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ('data: {"choices": []}\n\n', "broke off"),
        ('data: {"error": "x"}\n\ndata: [DONE]\n\n', "an error in the stream"),
        ('data: {"choices": []}\n\ndata: [DONE]\n\n', "ended with ''"),
    ],
)
def test_a_stream_that_does_not_end_well_is_a_violation(liar, stream, message):
    assert message in ask(liar, [stream], "follow_a_schema", stream=True)[0]


def test_the_report_says_first_what_was_wrong(tmp_path):
    outcome = Outcome(
        violations=["2 of 8 pages are lost"],
        samples=samples([700.0, 710.0]),
        counts={"probe: 200": 1234},
        num_tokens=5,
        growth=0.031,
        before=Process(1, 14, 20),
        after=Process(1, 15, 20),
        num_pages=8,
        num_free_pages=6,
        exit_code=-15,
        info={"stats": {"num_running": 0, "num_waiting": 1, "num_preemptions": 3, "finished": {}, "num_committed": 6}},
    )
    settings = {"command": "python -m x", "date": "today", "versions": {"jax": "1"}, "machine": "m", "seconds": 2}
    settings |= {"max_growth": 0.02}
    text = markdown("name", outcome, settings)
    assert text.index("**1 violations:**") < text.index("- 2 of 8 pages are lost") < text.index("| pages free")
    for row in (
        "| 6 of 8 | all |",
        "| +3.10% | at most +2% |",
        "| -15 | 0 |",
        "| probe: 200 | 1,234 |",
        "| 15 | at most 14",
    ):
        assert row in text, row
    write(tmp_path / "new", "name", outcome, settings)
    saved = json.loads((tmp_path / "new" / "name.json").read_text())
    assert saved["samples"]["resident_bytes"] == [700_000_000, 710_000_000]
    assert saved["violations"] == outcome.violations
    assert (tmp_path / "new" / "name.png").read_bytes().startswith(b"\x89PNG")
