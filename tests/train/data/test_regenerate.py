"""Answering chats anew: a scripted answerer for the files, a random model and a local server for the two real ones."""

import functools
import json
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import idlm_jax
from idlm_jax.model.language_model import from_module
from tests.support.tiny_model import sharpen, tiny_module
from tests.train.data.conftest import python_text
from train.data.answerers import answer_with_endpoint, answer_with_model
from train.data.regenerate import Answer, Chat, Dialogue, LeftOut, RegenerateSettings, read_chats, regenerate
from train.data.tokenizer import train_tokenizer

SETTINGS = RegenerateSettings(model="m", max_tokens=8)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def write_chats(path: Path, chats: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scripted(chats: Iterable[Chat], settings: RegenerateSettings) -> Iterator[Dialogue]:
    """Answers in capitals; "cut" is cut off, "fail" fails, "quiet" is answered by nothing."""
    for chat in chats:
        dialogue = Dialogue(chat, settings)
        while dialogue.is_open:
            question = dialogue.messages[-1]["content"]
            if question == "fail":
                dialogue.take(LeftOut("failed", "status 500"))
            else:
                dialogue.take(Answer("" if question == "quiet" else question.upper(), question != "cut"))
        yield dialogue


@pytest.fixture
def source(tmp_path):
    return write_chats(tmp_path / "in.jsonl", [turns(f"question {index}", "old", "and?") for index in range(20)])


def test_every_answer_is_replaced_in_order_and_a_last_question_is_answered(tmp_path):
    chats = [
        turns("a", "old", "b", "old"),
        [{"role": "system", "content": "s"}, *turns("a", "old", "b")],
        turns("a"),
    ]
    source = write_chats(tmp_path / "in.jsonl", chats)
    report = regenerate(source, tmp_path / "out.jsonl", scripted, SETTINGS)
    written = [record["messages"] for record in records(tmp_path / "out.jsonl")]
    assert written == [
        turns("a", "A", "b", "B"),
        [{"role": "system", "content": "s"}, *turns("a", "A", "b", "B")],
        turns("a", "A"),
    ]
    assert (report.chats, report.answered, report.left_out) == (3, 3, {})


def test_what_is_left_out_is_counted_by_reason_and_logged_with_its_line(tmp_path):
    source = write_chats(tmp_path / "in.jsonl", [turns(text) for text in ("a", "cut", "fail", "quiet", "b")])
    report = regenerate(source, tmp_path / "out.jsonl", scripted, SETTINGS)
    assert [record["line"] for record in records(tmp_path / "out.jsonl")] == [1, 5]
    assert report.left_out == {2: "unfinished", 3: "failed", 4: "empty answer"}
    assert report.answered + sum(report.reasons.values()) == report.chats == 5
    assert [record["line"] for record in records(tmp_path / "out.jsonl.run")[1:]] == [2, 3, 4]


def test_unfinished_answers_can_be_kept_and_are_flagged(tmp_path):
    source = write_chats(tmp_path / "in.jsonl", [turns("a"), turns("cut")])
    settings = RegenerateSettings(model="m", keep_unfinished=True)
    report = regenerate(source, tmp_path / "out.jsonl", scripted, settings)
    assert [record["finish_reason"] for record in records(tmp_path / "out.jsonl")] == ["stop", "length"]
    assert (report.answered, report.unfinished) == (2, 1)


@pytest.mark.parametrize("torn_bytes", [0, 1, 37])
def test_a_killed_run_goes_on_and_ends_with_the_same_file(source, tmp_path, torn_bytes):
    regenerate(source, tmp_path / "whole.jsonl", scripted, SETTINGS)
    asked = []

    def killed(chats, settings, after):
        for count, dialogue in enumerate(scripted(chats, settings)):
            if count == after:
                raise KeyboardInterrupt
            asked.append(dialogue.line)
            yield dialogue

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        regenerate(source, out, functools.partial(killed, after=7), SETTINGS)
    out.write_bytes(out.read_bytes()[: -torn_bytes or None])
    report = regenerate(source, out, functools.partial(killed, after=99), SETTINGS)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(asked) == 20 + (torn_bytes > 0) and report.resumed == 7 - (torn_bytes > 0)


def test_a_finished_run_asks_nothing_more_but_tries_failures_again(tmp_path):
    source = write_chats(tmp_path / "in.jsonl", [turns(text) for text in ("a", "cut", "fail", "b")])
    out = tmp_path / "out.jsonl"
    regenerate(source, out, scripted, SETTINGS)
    asked = []

    def healthy(chats, settings):
        for chat in chats:
            asked.append(chat.line)
            dialogue = Dialogue(chat, settings)
            dialogue.take(Answer("now it works", True))
            yield dialogue

    report = regenerate(source, out, healthy, SETTINGS)
    assert asked == [3] and report.left_out == {2: "unfinished"} and report.answered == 3
    assert [record["line"] for record in records(out)] == [1, 4, 3]
    regenerate(source, out, healthy, SETTINGS)
    assert asked == [3]


def test_a_larger_limit_continues_a_smaller_one(source, tmp_path):
    out = tmp_path / "out.jsonl"
    assert regenerate(source, out, scripted, SETTINGS, limit=5).answered == 5
    report = regenerate(source, out, scripted, SETTINGS, limit=12)
    assert (report.answered, report.resumed) == (12, 5) and len(records(out)) == 12


def test_other_settings_or_another_input_do_not_mix_into_a_file(source, tmp_path):
    out = tmp_path / "out.jsonl"
    regenerate(source, out, scripted, SETTINGS, limit=2)
    with pytest.raises(ValueError, match=r"begun with max_tokens=8 \(now 9\): choose another"):
        regenerate(source, out, scripted, RegenerateSettings(model="m", max_tokens=9))
    source.write_text(source.read_text().replace("question 0", "question"))
    with pytest.raises(ValueError, match=r"begun with input_sha256="):
        regenerate(source, out, scripted, SETTINGS)
    (tmp_path / "thesis.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"thesis\.jsonl exists and thesis\.jsonl\.run beside it does not"):
        regenerate(source, tmp_path / "thesis.jsonl", scripted, SETTINGS)
    with pytest.raises(ValueError, match="is the input"):
        regenerate(source, source, scripted, SETTINGS)


def test_a_dead_server_stops_the_run_instead_of_failing_every_line(tmp_path):
    source = write_chats(tmp_path / "in.jsonl", [turns("fail")] * 50)
    with pytest.raises(ValueError, match=r"20 chats in a row failed, the last with: status 500; .* goes on from there"):
        regenerate(source, tmp_path / "out.jsonl", scripted, SETTINGS)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{broken", "in.jsonl:2: Expecting property name"),
        ('{"tokens": [1]}', "in.jsonl:2: holds tokens; only chats"),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', "in.jsonl:2: an assistant's turn follows no"),
    ],
)
def test_a_line_that_cannot_be_answered_is_named(tmp_path, line, complaint):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": turns("a")}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        read_chats(path)


def test_every_answer_has_a_seed_of_its_own():
    seeds = {RegenerateSettings(model="m", seed=seed).seed_of(line, turn) for seed in range(3) for line in range(20)
             for turn in range(3)}  # fmt: skip
    assert len(seeds) == 180 and max(seeds) < 2**31


@pytest.fixture(scope="module")
def lm():
    tokenizer = train_tokenizer([python_text(seed) for seed in range(20)], vocab_size=300)
    # Sharpened, or the random model would hardly depend on its prompt.
    return from_module(sharpen(tiny_module(vocab_size=300, mask_token_id=3), 20.0), tokenizer=tokenizer)


def test_the_models_answers_are_its_greedy_ar_answers_to_each_chat_alone_also_after_a_resume(lm, source, tmp_path):
    settings = RegenerateSettings(model="m", max_tokens=6, keep_unfinished=True)
    answer = functools.partial(answer_with_model, lm=lm, method=idlm_jax.ISD(stride=4), batch_size=2)
    out = tmp_path / "out.jsonl"
    regenerate(source, out, answer, settings, limit=2)
    regenerate(source, out, answer, settings, limit=4)
    written = records(out)
    assert [record["line"] for record in written] == [1, 2, 3, 4]
    params = idlm_jax.SamplingParams(max_tokens=6, stop_token_ids=(2,))
    for record in written:
        messages = record["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        for turn in (1, 3):
            prompt = lm.tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
            (alone,) = idlm_jax.generate(lm, [prompt], idlm_jax.AR(), params)
            assert alone.text == messages[turn]["content"]
    assert len({record["messages"][1]["content"] for record in written}) > 1


def test_prompts_beyond_the_models_positions_are_left_out(lm, tmp_path):
    source = write_chats(tmp_path / "in.jsonl", [turns("word " * 600), turns("a")])
    settings = RegenerateSettings(model="m", max_tokens=4, keep_unfinished=True)
    answer = functools.partial(answer_with_model, lm=lm, method=idlm_jax.AR(), batch_size=2)
    report = regenerate(source, tmp_path / "out.jsonl", answer, settings)
    assert report.left_out == {1: "prompt too long"} and report.answered == 1


class Server(ThreadingHTTPServer):
    """Answers in capitals; misbehaves as often as a question asks for, as in "503 twice"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None, dict]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.requests.append((self.path, self.headers["Authorization"], body))
            attempt = sum(seen["messages"] == body["messages"] for _, _, seen in server.requests)
        status, _, count = question.partition(" ")
        if status.isdigit() and (count == "always" or (count == "twice" and attempt <= 2)):
            self.reply(int(status), b"out of order")
        elif question == "nonsense":
            self.reply(200, b"<html>")
        else:
            finish_reason = "length" if question == "long" else "stop"
            choice = {"message": {"role": "assistant", "content": question.upper()}, "finish_reason": finish_reason}
            self.reply(200, json.dumps({"choices": [choice]}).encode())

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, **changes):
    options = {"url": server.url, "api_key": None, "threads": 4, "retries": 3, "first_wait_s": 0.001, **changes}
    return functools.partial(answer_with_endpoint, **options)


def test_the_endpoint_gets_what_openai_would_and_answers_stay_in_order(server, source, tmp_path):
    settings = RegenerateSettings(model="qwen", temperature=0.5, max_tokens=77, seed=3)
    regenerate(source, tmp_path / "out.jsonl", ask(server, api_key="not-a-key"), settings)
    written = records(tmp_path / "out.jsonl")
    assert [record["line"] for record in written] == list(range(1, 21))
    assert written[4]["messages"] == turns("question 4", "QUESTION 4", "and?", "AND?")
    assert len(server.requests) == 40
    path, key, body = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer not-a-key")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("qwen", 0.5, 77)
    assert len({body["seed"] for _, _, body in server.requests}) == 40


def test_busy_and_broken_servers_are_asked_again_and_refusals_are_not(server, tmp_path):
    questions = ["503 twice", "429 twice", "500 always", "400 always", "nonsense", "long", "fine"]
    source = write_chats(tmp_path / "in.jsonl", [turns(question) for question in questions])
    report = regenerate(source, tmp_path / "out.jsonl", ask(server), SETTINGS)
    attempts = {question: 0 for question in questions}
    for _, _, body in server.requests:
        attempts[body["messages"][-1]["content"]] += 1
    assert list(attempts.values()) == [3, 3, 4, 1, 1, 1, 1]
    assert report.left_out == {3: "failed", 4: "failed", 5: "failed", 6: "unfinished"}
    details = {record["line"]: record["detail"] for record in records(tmp_path / "out.jsonl.run")[1:]}
    assert details[3] == "4 attempts, the last: status 500: out of order"
    assert details[4] == "status 400: out of order"
    assert "no chat completion" in details[5]


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_address_stops_at_once(server, tmp_path, status):
    source = write_chats(tmp_path / "in.jsonl", [turns(f"{status} always")] * 100)
    with pytest.raises(ValueError, match=rf"answered with status {status}: .*check the address, the key"):
        regenerate(source, tmp_path / "out.jsonl", ask(server, threads=1), SETTINGS)
    assert len(server.requests) < 10


def test_a_server_that_is_not_there_is_reported_and_the_rerun_answers(server, tmp_path):
    source = write_chats(tmp_path / "in.jsonl", [turns("a"), turns("b")])
    out = tmp_path / "out.jsonl"
    # Port 9 (discard) of this machine: nothing listens there.
    gone = ask(server, url="http://127.0.0.1:9/v1", retries=1)
    assert regenerate(source, out, gone, SETTINGS).reasons == {"failed": 2}
    assert regenerate(source, out, ask(server), SETTINGS).answered == 2
