"""Drafting and verifying in two forwards: the text is AR's, the forwards alternate."""

import numpy as np
import pytest

from idlm_jax.decoding import AR, ISD, SamplingParams, TwoPass, generate
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.support.tiny_model import random_prompts, sharpen, tiny_module


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return from_module(sharpen(tiny_module(3, vocab_size=12, mask_token_id=11), 4.0))


def test_greedy_text_is_ar_s_in_fewer_forwards_than_tokens(lm):
    prompts = random_prompts(12, 20, 11)
    params = SamplingParams(max_tokens=32)
    ar = generate(lm, prompts, AR(), params)
    for stride in (2, 4):
        found = generate(lm, prompts, TwoPass(stride), params)
        assert [each.token_ids for each in found] == [each.token_ids for each in ar]
        assert sum(each.num_forwards for each in found) < sum(each.num_forwards for each in ar)


def test_forwards_alternate_between_drafting_and_verifying(lm):
    [found] = generate(lm, random_prompts(1, 8, 11), TwoPass(4), SamplingParams(max_tokens=40, ignore_eos=True))
    drafting, verifying = found.num_cold_starts, found.num_forwards - 1 - found.num_cold_starts
    # The prefill has drafted, so the first forward behind it verifies.
    assert verifying - drafting in (0, 1) and drafting > 0
    # A drafting forward commits one token, a verifying one a token more than it accepts.
    budget_cut = 3
    accepted = sum(found.accepted_by_depth)
    assert 0 <= 1 + drafting + verifying + accepted - len(found.token_ids) <= budget_cut


def test_drafts_are_those_that_isd_makes_where_it_starts_cold(lm):
    # At stride 2 every refusal in ISD is followed by the very forward that drafts here.
    prompts = random_prompts(6, 8, 11, seed=3)
    params = [SamplingParams(max_tokens=30, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(6)]
    isd, two = (generate(lm, prompts, method, params) for method in (ISD(stride=2), TwoPass(2)))
    first = [each.token_ids[:2] for each in isd]
    assert [each.token_ids[:2] for each in two] == first


@pytest.mark.parametrize("temperature", [0.7])
def test_samples_are_distributed_as_ar_s(lm, temperature):
    # 2,048 continuations of three tokens over a small vocabulary, compared place by place with AR's own.
    count = 2048
    params = [SamplingParams(max_tokens=3, temperature=temperature, seed=seed) for seed in range(count)]
    prompt = random_prompts(1, 6, 11, seed=5)[0]
    tables = []
    for method, shift in ((AR(), 0), (TwoPass(4), count)):
        wanted = [SamplingParams(max_tokens=3, temperature=temperature, seed=each.seed + shift) for each in params]
        texts = np.array([each.token_ids for each in generate(lm, [prompt] * count, method, wanted, batch_size=512)])
        tables.append(np.stack([np.bincount(texts[:, place], minlength=12) for place in range(3)]))
    ar, two = tables
    total = ar + two
    with np.errstate(invalid="ignore", divide="ignore"):
        chi = np.nansum((ar - two) ** 2 / total, axis=1)
    # 11 degrees of freedom: 45 has a tail of 5e-6 at each of three places.
    assert np.all(chi < 45), chi


@pytest.mark.parametrize("stride", [1, 17])
def test_strides_out_of_bounds_are_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        TwoPass(stride)
