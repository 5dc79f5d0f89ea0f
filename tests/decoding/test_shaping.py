"""Biases, penalties, floors: applied to every row of a window by what stands before it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.decoding import AR, ISD, SamplingParams, generate
from idlm_jax.decoding.shaping import empty_shaping, shape
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.decoding.twin import run_twin
from tests.support.tiny_model import random_prompts, sharpen, tiny_module

BIASED = SamplingParams(max_tokens=16, logit_bias=((3, 2.0), (5, -3.0), (3, 1.0)))
PENALISED = SamplingParams(max_tokens=16, presence_penalty=0.8, frequency_penalty=0.6, repetition_penalty=1.4)
REWARDED = SamplingParams(max_tokens=16, presence_penalty=-0.5, frequency_penalty=-0.4, repetition_penalty=0.8)
DELAYED = SamplingParams(max_tokens=16, min_tokens=7, stop_token_ids=(0, 1, 2, 4))
FLOORED = SamplingParams(max_tokens=16, min_p=0.3, top_p=0.95, logit_bias=((7, 0.5),))
ALL = [BIASED, PENALISED, REWARDED, DELAYED, FLOORED]
NAMES = ["biased", "penalised", "rewarded", "delayed", "floored"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return from_module(sharpen(tiny_module(3, vocab_size=12, mask_token_id=11), 4.0))


def ids(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_mixed_batch_decodes_each_request_as_its_definition_says(lm, temperature):
    prompts = random_prompts(len(ALL), 12, 11, seed=4)
    params = [dataclasses.replace(each, temperature=temperature, seed=seed) for seed, each in enumerate(ALL)]
    got = generate(lm, prompts, ISD(stride=3), params)
    expected = [run_twin(lm, *each) for each in zip(prompts, [ISD(stride=3)] * len(ALL), params, strict=True)]
    assert ids(got) == [each.token_ids for each in expected]
    assert [each.num_forwards for each in got] == [each.num_forwards for each in expected]


@pytest.mark.parametrize("params", ALL, ids=NAMES)
def test_greedy_isd_equals_ar(lm, params):
    prompts = random_prompts(64, 20, 11, seed=5)
    ar = generate(lm, prompts, AR(), params)
    isd = generate(lm, prompts, ISD(stride=4), params)
    assert ids(isd) == ids(ar)
    assert sum(sum(each.accepted_by_depth) for each in isd) > 0
    # The parameter does something.
    if params is not FLOORED:
        plain = dataclasses.replace(SamplingParams(max_tokens=16), stop_token_ids=params.stop_token_ids)
        assert ids(ar) != ids(generate(lm, prompts, AR(), plain))


def test_neighbours_who_want_nothing_get_what_they_get_alone(lm):
    prompts = random_prompts(4, 20, 11, seed=6)
    plain = SamplingParams(max_tokens=16, temperature=1.0, seed=3)
    alone = generate(lm, prompts[:1], ISD(stride=4), plain)
    together = generate(lm, prompts, ISD(stride=4), [plain, *ALL[:3]])
    assert ids(together)[:1] == ids(alone)


def test_no_stop_id_stands_before_min_tokens(lm):
    prompts = random_prompts(32, 20, 11, seed=7)
    lengths = [len(tokens) for tokens in ids(generate(lm, prompts, ISD(stride=4), DELAYED))]
    assert min(lengths) == DELAYED.min_tokens + 1


def test_a_mask_of_bits_permits_exactly_those_ids():
    rng = np.random.default_rng(0)
    permitted = rng.random((2, 3, 75)) < 0.3
    padded = np.pad(permitted, ((0, 0), (0, 0), (0, 96 - 75)), constant_values=True)
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
    words = (padded.reshape(2, 3, 3, 32) * weights).sum(-1, dtype=np.uint32)
    logits = jnp.asarray(rng.normal(size=(2, 3, 75)), jnp.float32)
    nothing = jnp.zeros((2, 0), jnp.int32)
    where, stops = jnp.zeros(2, jnp.int32), jnp.full((2, 1), -1, jnp.int32)
    shaped = shape(logits, empty_shaping(2, 75), nothing, where, stops, jnp.zeros(2), jnp.asarray(words))
    np.testing.assert_array_equal(np.asarray(shaped), np.where(permitted, np.asarray(logits), -np.inf))


def test_a_bias_on_a_foreign_id_is_refused(lm):
    with pytest.raises(ValueError, match=r"logit_bias names ids \[12\] outside the vocabulary of 12"):
        generate(lm, [[1]], AR(), SamplingParams(logit_bias=((12, 1.0),)))
