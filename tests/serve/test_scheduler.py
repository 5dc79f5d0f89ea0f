"""Scheduler and pages under random arrivals, aborts and outcomes, against a device that checks every read."""

import random
from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import Phase as Stage
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from serve.requests import Limits, Phase, QueueFull, Request, WindowSize
from serve.scheduler import Scheduler
from tests.serve.fake_device import FakeDevice, completion, report

SHAPES = ((1, 4), (1, 8), (2, 4))


def limits(**changes) -> Limits:
    sizes = {
        "num_slots": 3,
        "num_pages": 12,
        "page_size": 4,
        "windows": (WindowSize(3, 5),),
        "max_len": 40,
        "prefill_shapes": SHAPES,
        "max_step_rows": 20,
        "max_queued": 100,
    }
    return Limits(**(sizes | changes))


class Serving(RuleBasedStateMachine):
    """One step is always in flight when the next is planned, as in the engine."""

    sizes = limits()

    def __init__(self):
        super().__init__()
        choices = random.Random(1)
        self.scheduler = Scheduler(self.sizes, lambda num_decoding: choices.randrange(len(self.sizes.windows)))
        self.device = FakeDevice(self.sizes, seed=0)
        self.in_flight: deque = deque()
        self.prompts: dict[Request, list[int]] = {}
        self.ended: set[Request] = set()
        self.aborted: set[Request] = set()

    # Prompts over two ids, of several pages: most share their beginnings.
    @rule(
        start=st.integers(0, 1),
        length=st.integers(1, 22),
        max_tokens=st.integers(1, 18),
        is_stepwise=st.booleans(),
        reads_whole_prompt=st.booleans(),
    )
    def submit(self, start: int, length: int, max_tokens: int, is_stepwise: bool, reads_whole_prompt: bool) -> None:
        prompt = [1 + start] * min(length, 9) + [3] * max(length - 9, 0)
        request = Request(prompt, max_tokens, is_stepwise=is_stepwise, reads_whole_prompt=reads_whole_prompt)
        self.scheduler.add(request)
        self.prompts[request] = prompt

    @rule()
    def step(self) -> None:
        step = self.scheduler.plan()
        if step is not None:
            rows = len(step.windows) * self.sizes.window_len + step.prefill_shape[0] * step.prefill_shape[1]
            for window in step.windows:
                assert not window.request.is_stepwise or self.is_read(window.request), "planned on what is not known"
            assert not any(c.request.reads_whole_prompt and c.request.num_cached_tokens for c in step.chunks)
            assert not step.chunks or rows <= self.sizes.max_step_rows or step.prefill_shape == SHAPES[0]
            self.in_flight.append((step, self.device.run(step)))
        if len(self.in_flight) > 1 or (step is None and self.in_flight):
            self.read()

    def is_read(self, request: Request) -> bool:
        """Whether no step in flight holds news of it."""
        parts = [part for step, _ in self.in_flight for part in (*step.windows, *step.chunks)]
        return not any(part.request is request and not part.is_void for part in parts)

    def read(self) -> None:
        for request in report(self.scheduler, *self.in_flight.popleft()):
            assert request not in self.ended | self.aborted
            self.ended.add(request)
            prompt = self.prompts[request]
            assert request.tokens[len(prompt) :] == completion(prompt, request.end - len(prompt))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def abort(self, data) -> None:
        request = data.draw(st.sampled_from(list(self.prompts)))
        self.scheduler.abort(request)
        assert request.phase is Phase.DONE and not request.pages
        if request not in self.ended:
            self.aborted.add(request)

    @rule()
    def forget(self) -> None:
        self.scheduler.pool.forget()

    @invariant()
    def consistent(self) -> None:
        self.scheduler.check()

    def teardown(self) -> None:
        for _ in range(5000):
            if self.scheduler.is_idle and not self.in_flight:
                break
            self.step()
            self.scheduler.check()
        assert self.ended | self.aborted == set(self.prompts), "a request never ended"
        pool = self.scheduler.pool
        pool.forget()
        pool.check([])
        assert pool.num_available == pool.num_usable


class TightServing(Serving):
    """A pool that hardly holds one of the longer requests, and more slots than it can feed."""

    sizes = limits(num_slots=5, num_pages=12, page_size=4, windows=(WindowSize(4, 7),))


class Autoregressive(Serving):
    sizes = limits(windows=(WindowSize(1, 1),), page_size=2, num_pages=24)


class Branched(Serving):
    sizes = limits(windows=(WindowSize(3, 7),), num_pages=14, max_step_rows=30)


class Choosing(Serving):
    """AR, a short stride, and a long window of many branches, in any order."""

    sizes = limits(windows=(WindowSize(1, 1), WindowSize(2, 3), WindowSize(4, 16)), num_pages=16, max_step_rows=60)


@pytest.mark.parametrize("machine", [Serving, TightServing, Autoregressive, Branched, Choosing])
def test_no_page_leaks_has_two_owners_or_is_shared_before_it_is_committed(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Stage.generate],  # a machine takes minutes to shrink
        ),
    )


def drive(scheduler: Scheduler, device: FakeDevice, num_steps: int = 10_000) -> int:
    """Steps until nothing is left; returns how many it took."""
    in_flight: deque = deque()
    for number in range(num_steps):
        step = scheduler.plan()
        if step is not None:
            in_flight.append((step, device.run(step)))
        if len(in_flight) > 1 or (step is None and in_flight):
            report(scheduler, *in_flight.popleft())
        scheduler.check()
        if scheduler.is_idle and not in_flight:
            return number
    raise AssertionError("requests are left")


def never_stops(prompt: list[int], max_tokens: int) -> bool:
    return len(completion(prompt, max_tokens)) == max_tokens


def test_requests_are_admitted_in_order_of_arrival_and_keep_their_slot():
    sizes = limits(num_pages=100)
    scheduler = Scheduler(sizes)
    device = FakeDevice(sizes, 0)
    requests = [Request([1 + i] * 4, 12) for i in range(6)]
    for request in requests:
        scheduler.add(request)
    admitted: dict[Request, int] = {}
    for _ in range(200):
        step = scheduler.plan()
        if step is None:
            break
        for request in scheduler.running:
            assert admitted.setdefault(request, request.slot) == request.slot
        report(scheduler, step, device.run(step))
    assert list(admitted) == requests


def test_a_chunk_budget_mixes_a_long_prompt_with_windows_of_others():
    sizes = limits(num_pages=100, max_len=200, max_step_rows=20)
    scheduler = Scheduler(sizes)
    device = FakeDevice(sizes, 0)
    short = Request(next(p for p in ([i] * 3 for i in range(1, 90)) if never_stops(p, 20)), 20)
    scheduler.add(short)
    long = Request([5] * 60, 1)
    report(scheduler, step := scheduler.plan(), device.run(step))
    scheduler.add(long)
    before = short.num_generated
    while long.phase is not Phase.DONE:
        step = scheduler.plan()
        assert step.windows or short.phase is Phase.DONE, "decoding waits for a long prompt"
        report(scheduler, step, device.run(step))
    assert short.num_generated > before


def test_short_prompts_are_read_together():
    scheduler = Scheduler(limits(num_pages=100))
    for length in (3, 4, 2):
        scheduler.add(Request([length] * length, 4))
    step = scheduler.plan()
    assert step.prefill_shape == (2, 4)
    assert [(chunk.num_tokens, chunk.is_last) for chunk in step.chunks] == [(3, True), (4, True)]


def test_a_prefix_is_found_by_whole_pages_and_never_up_to_the_last_token():
    sizes = limits(num_pages=100)
    for length, cached in ((12, 8), (13, 12), (15, 12), (4, 0), (5, 4)):
        scheduler = Scheduler(sizes)
        device = FakeDevice(sizes, 0)
        for _ in range(2):
            request = Request([1] * length, 2)
            scheduler.add(request)
            drive(scheduler, device)
        assert request.num_cached_tokens == cached


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation():
    sizes = limits(num_pages=100)
    scheduler = Scheduler(sizes)
    device = FakeDevice(sizes, 0)
    first = Request(next(p for p in ([i] * 5 for i in range(1, 90)) if never_stops(p, 11)), 11)
    scheduler.add(first)
    drive(scheduler, device)
    second = Request([*first.tokens, 2, 2], 2)
    scheduler.add(second)
    drive(scheduler, device)
    # 16 tokens, but the last one's keys and values were never written.
    assert second.num_cached_tokens == 12


def test_without_a_prefix_cache_nothing_is_found():
    sizes = limits(caches_prefixes=False)
    scheduler = Scheduler(sizes)
    device = FakeDevice(sizes, 0)
    for _ in range(2):
        request = Request([1] * 12, 2)
        scheduler.add(request)
        drive(scheduler, device)
    assert (request.num_cached_tokens, scheduler.pool.num_cached) == (0, 0)


def test_the_youngest_gives_way_when_pages_run_out_and_everybody_finishes():
    sizes = limits(num_slots=4, num_pages=13, max_len=48)
    scheduler = Scheduler(sizes)
    device = FakeDevice(sizes, 1)
    prompts = [p for p in ([i] * 3 for i in range(1, 90)) if never_stops(p, 30)][:4]
    requests = [Request(prompt, 30) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    drive(scheduler, device)
    assert requests[0].num_preemptions == 0
    assert sum(request.num_preemptions for request in requests) > 0
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.tokens[3:] == completion(prompt, 30)


def test_oversized_requests_and_a_full_queue_are_refused():
    scheduler = Scheduler(limits(max_queued=2))
    for prompt_len, max_tokens in ((30, 11), (41, 1)):
        with pytest.raises(ValueError, match="exceed the 40 tokens"):
            scheduler.add(Request([1] * prompt_len, max_tokens))
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.add(Request([], 3))
    with pytest.raises(ValueError, match="exceed the 10 tokens"):
        Scheduler(limits(num_pages=4)).add(Request([1] * 10, 2))
    for _ in range(2):
        scheduler.add(Request([1], 1))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        scheduler.add(Request([1], 1))


def test_a_request_that_must_end_with_what_is_in_flight_is_not_planned_again():
    scheduler = Scheduler(limits())
    scheduler.add(Request([1, 2], 1))
    assert scheduler.plan() is not None
    assert scheduler.plan() is None
