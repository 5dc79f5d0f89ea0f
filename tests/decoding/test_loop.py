"""The compiled entry points: bounded retracing, streaming equal to batch decoding, statistics, log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from idlm_jax.decoding import AR, ISD, SamplingParams, generate, stream_tokens
from idlm_jax.decoding.generate import prepare_batch, read_completions
from idlm_jax.decoding.loop import run_loop, run_prefill
from idlm_jax.decoding.state import Finish
from idlm_jax.decoding.step import decode_step, prefill
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.support.tiny_model import random_prompts, sharpen, tiny_module


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return from_module(sharpen(tiny_module(3, vocab_size=12, mask_token_id=11), 4.0))


@pytest.mark.proof
@pytest.mark.slow
def test_while_loop_equals_a_python_loop_over_the_same_step(lm):
    prompts = random_prompts(5, 12, 11)
    params = [SamplingParams(max_tokens=6 + 4 * i, temperature=0.5 * (i % 3), seed=i) for i in range(5)]
    compiled = generate(lm, prompts, ISD(stride=4), params)
    prepared = prepare_batch(lm, prompts, ISD(stride=4), params)
    module = nnx.merge(lm.graph, lm.params)
    step = jax.jit(lambda state: decode_step(module, prepared.plan, state))
    state = prefill(module, prepared.plan, prepared.state, prepared.prefill_rows)
    while bool(np.any(np.asarray(state.finish) == Finish.RUNNING)):
        state = step(state)
    looped = read_completions(lm, state, prepared.prompt_lens, params)
    assert [(c.token_ids, c.num_forwards, c.finish_reason) for c in looped] == [
        (c.token_ids, c.num_forwards, c.finish_reason) for c in compiled
    ]


def test_streaming_yields_exactly_the_tokens_of_generate(lm):
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=5)
    for prompt in random_prompts(3, 12, 11, seed=1):
        whole = generate(lm, [prompt], ISD(stride=4), params)[0]
        pieces = list(stream_tokens(lm, prompt, ISD(stride=4), params))
        assert [token for piece in pieces for token in piece] == whole.token_ids
        assert len(pieces) == whole.num_forwards
        assert all(1 <= len(piece) <= 4 for piece in pieces)


def test_retraces_grow_with_the_logarithm_of_sizes_not_with_requests(lm):
    def sizes() -> tuple[int, int]:
        return run_prefill._cache_size(), run_loop._cache_size()

    # A batch of greedy requests alone has a program of its own.
    generate(lm, random_prompts(3, 16, 11), ISD(stride=3), SamplingParams(max_tokens=8, temperature=0.5))
    before = sizes()
    for seed in range(6):
        # other lengths, budgets, temperatures, seeds and stops within the same buckets
        params = [
            SamplingParams(max_tokens=1 + seed + i, temperature=0.1 * i, seed=seed, stop_token_ids=(seed,) * (i % 2))
            for i in range(4)
        ]
        generate(lm, random_prompts(4, 16, 11, seed=seed), ISD(stride=3), params)
    assert sizes() == before
    for length in (17, 20, 31, 32):
        generate(lm, [[1] * length], ISD(stride=3), SamplingParams(max_tokens=8, temperature=0.5))
    assert sizes()[0] == before[0] + 1


def test_every_forward_is_counted_and_commits_one_to_stride_tokens(lm):
    for completion in generate(lm, random_prompts(20, 12, 11), ISD(stride=4), SamplingParams(max_tokens=33)):
        accepted = sum(completion.accepted_by_depth)
        # every forward commits its bonus or correction; only the cut at max_tokens may lose one
        assert completion.num_forwards + accepted - len(completion.token_ids) in (0, 1)
        assert all(a <= v for a, v in zip(completion.accepted_by_depth, completion.verified_by_depth, strict=True))
        # depth d + 1 is looked at only where depth d was accepted
        assert all(
            later <= earlier
            for later, earlier in zip(completion.verified_by_depth[1:], completion.accepted_by_depth, strict=False)
        )
        assert 1.0 <= completion.tokens_per_forward <= 4.0
    ar = generate(lm, random_prompts(3, 12, 11), AR(), SamplingParams(max_tokens=9))
    assert {c.tokens_per_forward for c in ar} == {1.0}
    assert all(np.isnan(c.acceptance_rate) for c in ar)


def test_logprobs_are_those_of_the_causal_distribution_without_temperature(lm):
    params = SamplingParams(max_tokens=12, temperature=0.7, top_k=5, seed=9, logprobs=3)
    prompt = [1, 2, 3]
    completion = generate(lm, [prompt], ISD(stride=4), params)[0]
    assert completion.logprobs is not None
    logits = np.array(lm.logits(np.array([prompt + completion.token_ids], np.int32)))[0]
    logits[:, lm.config.mask_token_id] = -np.inf
    for index, entry in enumerate(completion.logprobs):
        row = logits[len(prompt) + index - 1].astype(np.float64)
        row -= np.log(np.exp(row - row.max()).sum()) + row.max()
        assert entry.token_id == completion.token_ids[index]
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        best = sorted(range(len(row)), key=lambda token: -row[token])[:3]
        assert list(entry.top) == best
        assert list(entry.top.values()) == pytest.approx(row[best].tolist(), abs=1e-4)


def test_stop_tokens_end_a_completion_and_are_its_last_token(lm):
    prompt = [4, 2, 9]
    free = generate(lm, [prompt], ISD(stride=4), SamplingParams(max_tokens=30, temperature=1.0, seed=2))[0]
    stop = free.token_ids[10]
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=2, stop_token_ids=(stop, 7))
    first = min(free.token_ids.index(token) for token in (stop, 7) if token in free.token_ids)
    stopped = generate(lm, [prompt], ISD(stride=4), params)[0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"


def test_end_of_sequence_ids_stop_unless_ignored():
    lm = from_module(sharpen(tiny_module(3, vocab_size=12, mask_token_id=11, eos_token_ids=tuple(range(11))), 4.0))
    one = generate(lm, [[1, 2]], ISD(stride=4), SamplingParams(max_tokens=6))[0]
    assert (len(one.token_ids), one.finish_reason) == (1, "stop")
    many = generate(lm, [[1, 2]], ISD(stride=4), SamplingParams(max_tokens=6, ignore_eos=True))[0]
    assert (len(many.token_ids), many.finish_reason) == (6, "length")


def test_rejected_and_mask_rows_never_enter_the_context(lm):
    """Poisons every cache slot behind `context_len` between forwards; the tokens must not notice."""
    prompt, params = [1, 5, 2], [SamplingParams(max_tokens=25, temperature=0.9, seed=1)]
    prepared = prepare_batch(lm, [prompt], ISD(stride=4), params)
    clean = generate(lm, [prompt], ISD(stride=4), params)[0]
    state = run_prefill(lm.graph, lm.params, prepared.plan, prepared.state, prepared.prefill_rows)
    while int(state.finish[0]) == Finish.RUNNING:
        # One request, whose pages lie in order: [pages, page] is the order of its slots.
        slots = jnp.arange(state.cache.num_pages * state.cache.page_size).reshape(-1, state.cache.page_size)
        stale = (slots >= state.context_len[0])[None, :, None, :, None]
        cache = jax.tree.map(lambda x, s=stale: jnp.where(s, jnp.nan, x), state.cache)
        state = run_loop(lm.graph, lm.params, prepared.plan, state._replace(cache=cache), jnp.int32(1))
    assert read_completions(lm, state, prepared.prompt_lens, params)[0].token_ids == clean.token_ids
