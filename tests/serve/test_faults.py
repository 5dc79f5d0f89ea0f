"""A failed step, a caller who does not listen, a device that stays away: who suffers, and what the rest is told."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from idlm_jax.decoding import AR, SamplingParams, generate
from serve.device import Device, Draws
from serve.engine import Engine, EngineError
from serve.runs import ReadLater
from tests.support.tiny_model import random_prompts

GREEDY = SamplingParams(max_tokens=24)


class Faulty:
    """A device whose n-th decode fails: before its launch, or when its outcome is read."""

    def __init__(self, device: Device, fails_at: int, *, when_read: bool = False, comes_back: bool = True):
        self.device, self.countdown = device, fails_at
        self.when_read, self.comes_back = when_read, comes_back
        self.may_fail = threading.Event()

    def decode(self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0) -> ReadLater:
        self.countdown -= 1
        if self.countdown == 0:
            assert self.may_fail.wait(60)
            if self.when_read:
                self.device.decode(words, draws, masks, choice)
                return Poisoned()
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return self.device.decode(words, draws, masks, choice)

    def prefill(self, words: np.ndarray, masks: np.ndarray | None = None, choice: int = 0) -> ReadLater:
        return self.device.prefill(words, masks, choice)

    def reset(self) -> None:
        if not self.comes_back:
            raise RuntimeError("device is gone")
        self.device.reset()


class Poisoned:
    def __array__(self) -> np.ndarray:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.parametrize("when_read", [False, True])
def test_a_failed_step_fails_the_requests_in_it_and_no_others(lm, device, start, when_read):
    faulty = Faulty(device, 4, when_read=when_read)
    engine = start(device=faulty)
    prompts = random_prompts(10, 12, 11)
    handles = [engine.submit(prompt, GREEDY) for prompt in prompts]
    faulty.may_fail.set()
    expected = [completion.token_ids for completion in generate(lm, prompts, AR(), GREEDY)]
    outcomes = []
    for handle in handles:
        try:
            outcomes.append(handle.result()[0])
        except EngineError as error:
            outcomes.append(str(error))
    message = "a step failed: RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    failed = outcomes.count(message)
    assert 1 <= failed <= 4
    assert all(outcome in (message, want) for outcome, want in zip(outcomes, expected, strict=True))
    assert engine.stats().finished == {"error": failed, "length": 10 - failed}
    # and it goes on, without prefixes from before the fault
    again = engine.submit(prompts[0], GREEDY)
    assert again.result() == (expected[0], "length")


def test_a_device_that_does_not_come_back_closes_the_engine(device, start):
    faulty = Faulty(device, 2, comes_back=False)
    engine = start(device=faulty)
    handles = [engine.submit([1, 2, 3], GREEDY) for _ in range(9)]
    faulty.may_fail.set()
    for index, handle in enumerate(handles):
        was_running = index < 4
        with pytest.raises(EngineError, match="out of memory$" if was_running else "RuntimeError: device is gone$"):
            handle.result()
    with pytest.raises(EngineError, match="does not come back"):
        engine.submit([1], GREEDY)
    engine.close()


def test_a_broken_invariant_fails_requests_instead_of_the_thread(start):
    broken = threading.Event()

    def check(scheduler) -> None:
        if not broken.is_set():
            broken.set()
            raise AssertionError("pages are lost")

    engine = start(after_step=check)
    with pytest.raises(EngineError, match="AssertionError: pages are lost"):
        engine.submit([1, 2], GREEDY).result()
    assert engine.submit([1, 2], GREEDY).result()[1] == "length"


def test_nobody_waits_for_a_thread_that_has_ended(device, start):
    faulty = Faulty(device, 1)
    engine: Engine = start(device=faulty)

    def forget() -> None:
        raise AssertionError("pages are lost")

    engine._scheduler.pool.forget = forget
    handles = [engine.submit([1, 2], GREEDY) for _ in range(6)]
    engine.flush_cache()
    faulty.may_fail.set()
    for handle in handles:
        with pytest.raises(EngineError, match=r"the engine failed: AssertionError: pages are lost$|out of memory$"):
            handle.result()
    with pytest.raises(EngineError, match="the engine failed"):
        engine.submit([1], GREEDY)


def test_a_caller_who_cannot_take_his_tokens_harms_nobody_else(lm, start):
    engine: Engine = start()

    def refuse(piece) -> None:
        raise RuntimeError("event loop is closed")

    prompts = random_prompts(3, 12, 11)
    engine.submit(prompts[0], GREEDY, deliver=refuse)
    handles = [engine.submit(prompt, GREEDY) for prompt in prompts[1:]]
    expected = [completion.token_ids for completion in generate(lm, prompts[1:], AR(), GREEDY)]
    assert [handle.result()[0] for handle in handles] == expected
    assert engine.stats().finished == {"abort": 1, "length": 2}


def test_pieces_go_where_the_caller_wants_them(start):
    pieces, done = [], threading.Event()

    def take(piece) -> None:
        pieces.append(piece)
        if piece.finish_reason is not None:
            done.set()

    handle = start().submit([1, 2, 3], GREEDY, deliver=take)
    assert done.wait(60)
    assert sum(len(piece.token_ids) for piece in pieces) == 24
    assert len(pieces) == handle.num_forwards


def test_an_engine_that_waits_for_its_device_is_seen_to_stall_and_an_idle_one_is_not(device, start):
    faulty = Faulty(device, 1)
    engine = start(device=faulty)
    assert engine.stalled_s == 0.0
    handle = engine.submit([1, 2, 3], SamplingParams(max_tokens=2))
    assert poll(lambda: engine.stalled_s > 0.2)  # its decode hangs until the fault is let loose
    handle.abort()
    faulty.may_fail.set()
    assert poll(lambda: engine.stalled_s == 0.0)


def test_a_closed_engine_says_so(start):
    engine = start()
    assert engine.failure is None
    engine.close()
    assert engine.failure == "the engine is closed"


def poll(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()
