"""The load generator without a server: statistics of known records, arrivals, order, prompts."""

import asyncio
import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from serve.bench.client import Answer, Failure, Sampling
from serve.bench.load import Burst, Closed, Poisson
from serve.bench.measures import compare, compare_texts, distribution, measure
from serve.bench.prompts import read_prompts
from serve.bench.rounds import Run, schedule


def an_answer(**changes: Any) -> Answer:
    base = Answer(
        number=0,
        due_s=0.0,
        late_s=0.0,
        ttft_s=0.5,
        latency_s=2.5,
        num_chunks=4,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=5,
        num_forwards=2,
        verified_by_depth=[],
        accepted_by_depth=[],
        finish_reason="length",
        text="",
    )
    return dataclasses.replace(base, **changes)


def a_run(target: str, number: int, records: list[Answer | Failure], seconds: float = 1.0, **changes: Any) -> Run:
    run = Run("burst", target, number, records=records, seconds=seconds, client_cpu_s=0.25, is_complete=True)
    return dataclasses.replace(run, **changes)


FAILED = Failure(number=1, due_s=0.0, kind="HTTP 503", detail="busy")


# Statistics


def test_time_per_output_token_starts_after_the_first():
    assert an_answer(ttft_s=0.5, latency_s=2.5, completion_tokens=5).tpot_s == 0.5
    assert an_answer(completion_tokens=1).tpot_s is None


def test_percentiles_of_known_numbers():
    found = distribution([float(number) for number in range(101, 0, -1)])
    assert found is not None
    assert (found.mean, found.p50, found.p90, found.p99) == (51.0, 51.0, 91.0, 100.0)
    assert distribution([]) is None


def test_rates_latencies_and_acceptance_of_known_records():
    # Forwards and depths add up over requests: a mean of per-request ratios would give short answers too much weight.
    long = an_answer(completion_tokens=9, num_forwards=3, verified_by_depth=[6, 4], accepted_by_depth=[4, 1])
    short = an_answer(completion_tokens=1, num_forwards=1, verified_by_depth=[2, 0], accepted_by_depth=[0, 0])
    warm_up = a_run("x", 0, [an_answer(ttft_s=1e6)])
    (found,) = measure([warm_up, a_run("x", 1, [long, short], 2.0), a_run("x", 2, [long], 3.0)])
    assert found.num_answers == 3
    assert found.tokens_per_s is not None and found.requests_per_s is not None and found.ttft_s is not None
    assert dataclasses.astuple(found.tokens_per_s) == (4.0, 3.0, 5.0)
    assert found.requests_per_s.max == 1.0
    assert found.ttft_s.p99 == 0.5
    assert found.tpot_s is not None and found.tpot_s.mean == 0.25  # the answer of one token has none
    assert found.tokens_per_forward == 19 / 7
    assert found.acceptance_by_depth == [8 / 14, 2 / 8]
    assert (found.prompt_tokens, found.cached_share) == (10, 0.4)
    assert (found.client_cpu_share, found.client_s_per_chunk) == (0.5 / 5.0, 0.5 / 12)


def test_failed_requests_enter_no_number():
    (clean,) = measure([a_run("x", 1, [an_answer()])])
    (found,) = measure([a_run("x", 1, [FAILED, an_answer(), FAILED])])
    assert found == dataclasses.replace(clean, num_failures={"HTTP 503": 2})
    (nothing,) = measure([a_run("x", 1, [FAILED])])
    assert nothing.tokens_per_s is nothing.ttft_s is nothing.tokens_per_forward is None


def test_an_interrupted_run_counts_only_where_nothing_was_completed():
    broken = a_run("x", 2, [an_answer(ttft_s=9.0)], is_complete=False)
    whole, partial = measure([a_run("x", 1, [an_answer()]), broken, dataclasses.replace(broken, target="y")])
    assert whole.is_complete and whole.ttft_s is not None and whole.ttft_s.mean == 0.5
    assert not partial.is_complete and partial.ttft_s is not None and partial.ttft_s.mean == 9.0
    assert compare([a_run("y", 2, [an_answer()]), broken], "y")[0].num_rounds == 0


def test_ratios_are_taken_within_rounds():
    # The machine slows down tenfold, and the second round favours x less: the ratio of medians would be 20 / 10.
    runs = [a_run("x", number, [an_answer(completion_tokens=tokens)]) for number, tokens in ((1, 300), (2, 20), (3, 4))]
    runs += [
        a_run("y", number, [an_answer(completion_tokens=tokens)]) for number, tokens in ((1, 100), (2, 10), (3, 1))
    ]
    (found,) = compare(runs, "y")
    assert (found.target, found.num_rounds) == ("x", 3)
    assert found.tokens_per_s is not None
    assert dataclasses.astuple(found.tokens_per_s) == (3.0, 2.0, 4.0)
    assert found.ttft is not None and dataclasses.astuple(found.ttft) == (1.0, 1.0, 1.0)


def test_texts_are_compared_request_by_request():
    def runs(target: str, *texts: str) -> list[Run]:
        answers = [an_answer(number=number, text=text) for number, text in enumerate(texts)]
        # In the order in which they ended, which differs from target to target.
        return [a_run(target, 1, list(answers if target == "x" else reversed(answers)), first=10)]

    (found,) = compare_texts(runs("x", "a", "b", "c") + runs("y", "a", "B", "c", "d"), "y")
    assert (found.num_compared, found.num_different) == (3, 1)
    assert found.first_difference == (1, 11, "b", "B")


# Arrivals


class Caller:
    """Stands for the server: counts who is being served."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.seen: list[tuple[int, int]] = []
        self.due: list[float] = []

    async def send(self, number: int, due: float) -> None:
        self.in_flight += 1
        self.seen.append((number, self.in_flight))
        self.due.append(due)
        # Of different lengths, so that they end out of order.
        await asyncio.sleep(0.001 * (1 + number * 7 % 5))
        self.in_flight -= 1


def test_closed_loop_is_full_and_never_over_full():
    caller = Caller()
    asyncio.run(Closed(4).run(caller.send, 40, []))
    assert caller.seen == [(number, min(number + 1, 4)) for number in range(40)]


def test_closed_loop_with_fewer_requests_than_callers():
    caller = Caller()
    asyncio.run(Closed(8).run(caller.send, 3, []))
    assert caller.seen == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("load", [Burst(), Poisson(2000.0)])
def test_open_loop_does_not_wait_for_answers(load: Burst | Poisson):
    everybody = asyncio.Event()
    numbers = []

    async def send(number: int, due: float) -> None:
        numbers.append(number)
        if number == 19:
            everybody.set()
        await everybody.wait()  # nobody is answered before the last has asked

    async def run() -> None:
        async with asyncio.timeout(10):
            await load.run(send, 20, [0])

    asyncio.run(run())
    assert numbers == list(range(20))


def test_poisson_gaps_follow_the_seed_and_have_the_mean():
    gaps = Poisson(4.0).gaps(10_000, [1, 2, 3])
    assert gaps == Poisson(4.0).gaps(10_000, [1, 2, 3])
    assert gaps[:9] != Poisson(4.0).gaps(9, [1, 2, 4])
    # Mean and deviation of an exponential are equal; five standard errors, 6e-7 for a false alarm, once and for all.
    assert abs(statistics.fmean(gaps) - 0.25) < 5 * 0.25 / 100
    assert 0.23 < statistics.stdev(gaps) < 0.27


def test_poisson_requests_are_due_after_their_gaps():
    caller, load = Caller(), Poisson(500.0)
    asyncio.run(load.run(caller.send, 10, [7]))
    between = [later - earlier for earlier, later in itertools.pairwise(caller.due)]
    assert between == pytest.approx(load.gaps(9, [7]), abs=1e-9)  # differences of a clock's seconds


# Rounds


def test_targets_take_turns_and_the_order_turns_too():
    order = list(schedule([Closed(1), Closed(2)], 2, ["x", "y"]))
    one = [(0, "y"), (0, "x"), (1, "x"), (1, "y"), (2, "y"), (2, "x")]
    assert order == [(place, *rest) for place in (0, 1) for rest in one]


def test_parameters_that_ask_for_nothing_are_left_out():
    least = Sampling(max_tokens=4, temperature=0.0, top_p=1.0, ignore_eos=False, seed=10)
    assert least.body(7) == {"max_tokens": 4, "temperature": 0.0}
    full = Sampling(max_tokens=4, temperature=0.5, top_p=0.9, ignore_eos=True, seed=10)
    assert full.body(7) == {"max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "ignore_eos": True, "seed": 17}


# Prompts


def test_prompts_are_read_from_every_form(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    lines: list[dict[str, Any]] = [{"prompt": "plain\u2028text"}, {"conversations": turns}]
    lines += [{"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]}]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    plain, long, short = read_prompts(path, as_chat=True)
    assert plain == [{"role": "user", "content": "plain\u2028text"}]
    # What precedes the last answer is asked; a conversation that ends with the user, whole.
    assert [turn["content"] for turn in long] == ["a", "b", "c"] and long[1]["role"] == "assistant"
    assert short == [{"role": "user", "content": "d"}]
    text = tmp_path / "prompts.txt"
    text.write_text("  def main():\r\n\n{not json}\n")
    assert read_prompts(text, as_chat=False) == ["  def main():", "{not json}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "holds no prompt"),
        ('{"prompt": "a"}\n{', ":2: not JSON"),
        ("[1]", ":1: expected an object"),
        ('{"text": "a"}', """:1: expected "prompt", "messages" or "conversations", got ['text']"""),
        ('{"messages": [{"role": "user", "content": "a"}]}', ":1: holds a conversation, which takes --chat"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', ":1: the conversation has no user turn"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', ":1: a turn is"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_its_line(tmp_path: Path, content: str | bytes, message: str):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        read_prompts(path, as_chat=False)
    assert message in str(error.value) and "\n" not in str(error.value)
