"""What leaves the engine is what `generate` returns, whatever else the engine does at the time."""

import dataclasses
import itertools
import random
import threading

import jax
import numpy as np
import pytest

from idlm_jax.decoding import AR, ISD, Completion, SamplingParams, generate
from idlm_jax.model.language_model import from_module
from serve.config import EngineConfig
from serve.device import Device, Draws, draws_of
from serve.engine import Engine
from serve.handle import EngineError, RequestHandle
from serve.requests import QueueFull
from tests.serve.conftest import CONFIG
from tests.support.tiny_model import random_prompts, sharpen, tiny_module

GREEDY = SamplingParams(max_tokens=24)
TIGHT = dataclasses.replace(CONFIG, num_pages=13)


def tokens_of(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=20 + seed % 7, temperature=1.0, top_k=(seed % 3) * 4, seed=seed)


def check_statistics(handle: RequestHandle, completion: Completion) -> None:
    tally = handle.tally
    assert (tally.forwards, tally.cold_starts) == (completion.num_forwards, completion.num_cold_starts)
    assert tuple(tally.verified) == completion.verified_by_depth
    assert tuple(tally.accepted) == completion.accepted_by_depth
    if tally.verified.any():
        # Two programs over the same float32 model.
        rate = tally.accept_prob.sum() / tally.verified.sum()
        np.testing.assert_allclose(rate, completion.acceptance_rate, rtol=1e-4)


def test_greedy_requests_that_come_and_go_equal_ar(lm, start):
    engine = start()
    prompts = random_prompts(20, 30, 11)
    params = [SamplingParams(max_tokens=1 + 5 * (i % 8)) for i in range(20)]
    handles = []
    for first in range(0, 20, 5):
        handles += [engine.submit(*each) for each in zip(prompts[first : first + 5], params[first:], strict=False)]
        next(iter(handles[-1]))  # the next five arrive while these run
    results = [handle.result() for handle in handles if handle.params.max_tokens > 1]
    expected = tokens_of(generate(lm, prompts, AR(), params))
    got = [tokens for tokens, _ in results]
    # The piece taken above is missing from its own request.
    for handle, tokens in zip([h for h in handles if h.params.max_tokens > 1], got, strict=True):
        want = expected[handles.index(handle)]
        assert tokens == (want[-len(tokens) :] if handle in handles[4::5] else want)


@pytest.mark.parametrize("config", [CONFIG, TIGHT], ids=["roomy", "preempting"])
def test_seeded_requests_under_load_are_those_of_generate(lm, start, config):
    """The draft of a request, and so its random numbers, survive neighbours, chunks, and being thrown out."""
    engine = start(config)
    # What a preemption loses shows in few requests only.
    num = 64 if config is TIGHT else 12
    prompts = random_prompts(num, 40, 11, seed=1)
    params = [GREEDY if seed % 4 == 3 else sampled(seed) for seed in range(num)]
    handles = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    results = [handle.result() for handle in handles]
    expected = generate(lm, prompts, ISD(stride=4), params, batch_size=16)
    assert [tokens for tokens, _ in results] == tokens_of(expected)
    assert (engine.stats().num_preemptions > 0) == (config is TIGHT)
    if config is CONFIG:
        for handle, completion in zip(handles, expected, strict=True):
            check_statistics(handle, completion)
        stats = engine.stats()
        assert stats.tally.forwards == sum(completion.num_forwards for completion in expected)
        assert stats.num_committed == sum(len(tokens) for tokens, _ in results)
        assert stats.finished == {"length": 12}


def test_a_request_thrown_out_has_as_many_drafts_as_were_placed_for_it_when_it_is_back(lm, start):
    """One more or one less, and its random numbers would be others."""
    method = ISD(stride=4, rows=8)
    config = dataclasses.replace(TIGHT, method=method, decode_batches=(4,), prefill_shapes=((1, 16),))
    engine = start(config, device=Device(lm, config))
    prompts, params = random_prompts(64, 40, 11, seed=1), [sampled(seed) for seed in range(64)]
    handles = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    results = [handle.result() for handle in handles]
    assert [tokens for tokens, _ in results] == tokens_of(generate(lm, prompts, method, params, batch_size=64))
    assert engine.stats().num_preemptions > 0


def test_a_prefix_hit_changes_no_token(lm, start):
    engine = start()
    prompt = random_prompts(1, 1, 11, seed=2)[0] * 30 + [3, 1, 4]
    others = [[*prompt, 5], [*prompt, 6, 7], prompt[:17]]
    params = [sampled(1), GREEDY, sampled(2)]
    expected = tokens_of(generate(lm, others, ISD(stride=4), params))
    engine.submit(prompt, GREEDY).result()
    handles = [engine.submit(*each) for each in zip(others, params, strict=True)]
    assert [handle.result()[0] for handle in handles] == expected
    assert [handle.request.num_cached_tokens for handle in handles] == [32, 32, 16]
    engine.flush_cache()
    again = engine.submit(others[0], params[0])
    assert again.result()[0] == expected[0]
    assert again.request.num_cached_tokens == 0


def test_aborts_at_any_time_leave_the_others_alone(lm, start):
    engine = start(TIGHT)
    rng = random.Random(0)
    prompts = random_prompts(16, 30, 11, seed=3)
    expected = tokens_of(generate(lm, prompts, AR(), GREEDY))
    handles = [engine.submit(prompt, GREEDY) for prompt in prompts]
    doomed = rng.sample(range(16), 8)
    for index in doomed:
        if rng.random() < 0.5:
            next(iter(handles[index]))
        handles[index].abort()
    for index, handle in enumerate(handles):
        tokens, reason = handle.result()
        if index in doomed:
            assert reason in ("abort", "length")  # it may have been too late
            assert tokens in [expected[index][a:b] for a, b in itertools.combinations(range(25), 2)] + [[]]
        else:
            assert (tokens, reason) == (expected[index], "length")
    assert engine.stats().finished["abort"] > 0
    handles[0].abort()  # nothing to end any more


def test_pieces_are_what_single_forwards_committed(start):
    engine = start()
    handle = engine.submit([1, 2, 3], GREEDY)
    pieces = list(handle)
    assert all(1 <= len(piece.token_ids) <= 4 for piece in pieces)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) == handle.num_forwards


def test_every_chunk_of_a_long_prompt_is_a_forward(start):
    handle = start().submit([1] * 40, SamplingParams(max_tokens=1))
    assert len(handle.result()[0]) == 1
    assert (handle.num_forwards, handle.tally.forwards) == (3, 1)


def test_stop_ids_and_budgets_end_requests(lm, start):
    engine = start()
    free = engine.submit([4, 2, 9], sampled(5)).result()[0]
    stop = free[5]
    params = dataclasses.replace(sampled(5), stop_token_ids=(stop,))
    assert engine.submit([4, 2, 9], params).result() == (free[: free.index(stop) + 1], "stop")
    # A slot that is used again remembers nothing of its last request.
    assert engine.submit([4, 2, 9], sampled(5)).result() == (free, "length")


def test_nothing_is_compiled_after_start_up(start):
    engine = start()
    engine.submit([1], GREEDY).result()
    compiled: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        prompts = random_prompts(8, 40, 11, seed=4)
        for handle in [engine.submit(prompt, sampled(seed)) for seed, prompt in enumerate(prompts)]:
            handle.result()
        assert compiled == []
        jax.jit(lambda x: x + 1)(np.float32(1)).block_until_ready()
        assert compiled != [], "the listener hears nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_an_unforeseen_shape_is_an_error(device):
    with pytest.raises(KeyError):
        device.decode(np.zeros((3, 4), np.int32), Draws.GREEDY)


@pytest.mark.slow
def test_greedy_programs_leave_what_later_draws_for_others_need(lm):
    """A step of greedy requests alone runs another program than the one after a sampled request has arrived."""
    config = dataclasses.replace(CONFIG, decode_batches=(2,), max_running=2, prefill_shapes=((1, 16),))
    config = dataclasses.replace(config, specialised=True, max_logprobs=3)
    names: list[str] = []
    prompts = random_prompts(8, 12, 11, seed=6)
    params = [GREEDY, SamplingParams(max_tokens=9, temperature=0.9, seed=1), GREEDY, sampled(4)] * 2
    assert [draws_of(each) for each in params[:4]] == [Draws.GREEDY, Draws.PLAIN, Draws.GREEDY, Draws.FILTERED]
    with Engine(lm, config, progress=lambda done, total, name: names.append(f"{done}/{total} {name}")) as engine:
        handles = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
        results = [handle.result()[0] for handle in handles]
        reported = engine.submit(prompts[3], dataclasses.replace(params[3], logprobs=2))
        logprobs = [entry for piece in reported for entry in piece.logprobs or ()]
        with pytest.raises(ValueError, match="at most 3 alternatives"):
            engine.submit(prompts[3], dataclasses.replace(params[3], logprobs=4))
    assert len(names) == 6  # the idle state, four levels of decoding, one prefill
    assert names[-1].startswith("6/6 ")
    expected = generate(lm, prompts, ISD(stride=4), params)
    assert results == tokens_of(expected)
    for handle, completion in zip(handles, expected, strict=True):
        check_statistics(handle, completion)
    [want] = generate(lm, [prompts[3]], ISD(stride=4), dataclasses.replace(params[3], logprobs=2))
    assert want.logprobs is not None
    for entry, other in zip(logprobs, want.logprobs, strict=True):
        assert (entry.token_id, list(entry.top)) == (other.token_id, list(other.top))
        np.testing.assert_allclose(
            [entry.logprob, *entry.top.values()], [other.logprob, *other.top.values()], rtol=1e-4
        )


def test_an_engine_of_stride_one_is_ar():
    lm = from_module(sharpen(tiny_module(3, vocab_size=12, mask_token_id=None), 4.0))  # and needs no MASK id
    config = dataclasses.replace(CONFIG, method=ISD(stride=1), decode_batches=(4,), prefill_shapes=((1, 16),))
    prompts = random_prompts(6, 20, 12, seed=7)
    params = [GREEDY, sampled(1), sampled(2), GREEDY, sampled(3), sampled(4)]
    with Engine(lm, config, after_step=lambda it: it.check()) as engine:
        handles = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
        assert [handle.result()[0] for handle in handles] == tokens_of(generate(lm, prompts, AR(), params))
        assert {len(piece.token_ids) for piece in engine.submit([1], GREEDY)} == {1}
    with pytest.raises(ValueError, match="needs a MASK id"):
        Engine(lm, dataclasses.replace(config, method=ISD(stride=2)))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "empty"),
        ([1, 11], GREEDY, "MASK id 11"),
        ([12], GREEDY, "outside the vocabulary"),
        ([1] * 80, GREEDY, "80 tokens and max_tokens=24 exceed the 96"),
        ([1], SamplingParams(stop_token_ids=tuple(range(9))), "9 stop ids, but at most 8"),
        ([1], SamplingParams(max_tokens=4, logprobs=1), "no log-probabilities"),
        ("text", GREEDY, "no tokenizer"),
    ],
)
def test_a_request_out_of_bounds_is_refused_at_once(start, prompt, params, message):
    engine = start()
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, params)
    assert engine.stats().num_waiting == 0


def test_closing_drains_or_aborts_and_refuses_newcomers(start):
    engine = start()
    handles = [engine.submit([1, 2, seed], GREEDY) for seed in range(8)]
    engine.close()
    assert {handle.result()[1] for handle in handles} == {"length"}
    with pytest.raises(EngineError, match="closed"):
        engine.submit([1], GREEDY)
    engine = start()
    handles = [engine.submit([1, 2, 3], SamplingParams(max_tokens=90)) for _ in range(8)]
    engine.close(drain=False)
    assert "abort" in {handle.result()[1] for handle in handles}


def test_a_full_queue_refuses(start):
    engine = start(dataclasses.replace(CONFIG, max_queued=2))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        for _ in range(60):
            engine.submit([1, 2, 3], SamplingParams(max_tokens=60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_running": 0}, "max_running=0"),
        ({"num_pages": 1}, "at least 2"),
        ({"decode_batches": (2,)}, "must end at"),
        ({"prefill_shapes": ((2, 8),)}, "one request"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_default_shapes_are_few_powers_of_two(lm):
    config = EngineConfig(max_running=24, chunk_rows=256)
    assert config.decode_buckets == (1, 2, 4, 8, 16, 24)
    assert set(config.limits(lm.config).prefill_shapes) == {(1, 64), (2, 64), (4, 64), (1, 128), (2, 128), (1, 256)}
    with pytest.raises(ValueError, match="exceeds the model's 512"):
        dataclasses.replace(config, max_len=513).limits(lm.config)


@pytest.mark.slow
def test_a_crowd_with_shared_prefixes_and_aborts_from_many_threads_changes_no_token(lm, start):
    engine = start(dataclasses.replace(TIGHT, num_pages=21))
    rng = random.Random(8)
    stems = random_prompts(4, 40, 11, seed=8)
    prompts = [stems[i % 4] + random_prompts(1, 12, 11, seed=100 + i)[0] for i in range(192)]
    params = [dataclasses.replace(sampled(i), temperature=float(i % 3 > 0)) for i in range(192)]
    aborts_after = [rng.randrange(6) if rng.random() < 0.3 else None for _ in prompts]
    results: dict[int, tuple[list[int], str | None]] = {}

    def client(number: int) -> None:
        for index in range(number, 192, 8):
            tokens, reason = [], None
            handle = engine.submit(prompts[index], params[index])
            if aborts_after[index] == 0:
                handle.abort()
            for count, piece in enumerate(handle, 1):
                tokens += piece.token_ids
                reason = piece.finish_reason
                if count == aborts_after[index]:
                    handle.abort()
            results[index] = tokens, reason

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    stats = engine.stats()
    assert stats.num_preemptions > 0 and stats.num_cached_tokens > 0 and stats.finished["abort"] > 0
    expected = tokens_of(generate(lm, prompts, ISD(stride=4), params))
    for index, (tokens, reason) in results.items():
        want = expected[index]
        assert tokens == (want if reason == "length" else want[: len(tokens)]), index
        assert reason in (("length",) if aborts_after[index] is None else ("length", "abort"))
    assert len(results) == 192


@pytest.mark.parametrize("method", [AR(), ISD(stride=4)], ids=str)
def test_no_program_copies_the_pool(lm, method):
    """Once it did: AR at batch 1, where a step writes a single row, took a hundred times as long as it should."""
    sizes = dataclasses.replace(CONFIG, method=method, max_running=1, decode_batches=(1,), prefill_shapes=((1, 16),))
    device = Device(lm, dataclasses.replace(sizes, num_pages=20_000))
    pool_bytes = sum(pool.nbytes for pool in device._state.cache)
    assert len(device._programs) == 2
    for name, program in device._programs.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes, name
        assert memory.temp_size_in_bytes < pool_bytes / 20, name
