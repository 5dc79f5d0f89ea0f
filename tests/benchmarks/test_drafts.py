"""Drafts told apart by the token before them: the counts are `generate`'s, and the kinds are what branches allow."""

import numpy as np
import pytest

import idlm_jax
from benchmarks.drafts import BONUS, CORRECTION, SEEN, summary, watch
from idlm_jax.decoding.method import ISD
from tests.support.tiny_model import random_prompts, tiny_lm

PROMPTS = random_prompts(5, 9, 90)
PARAMS = [idlm_jax.SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(5)]


@pytest.mark.proof
@pytest.mark.parametrize("branches", [1, 3])
def test_watching_counts_what_generate_counts_and_never_a_group_that_was_not_there(branches):
    lm, method = tiny_lm(), ISD(3, branches=branches)
    watched = watch(lm, PROMPTS, method, PARAMS, batch_size=4)
    completions = idlm_jax.generate(lm, PROMPTS, method, PARAMS, batch_size=4)
    np.testing.assert_array_equal(watched.tokens, [len(each.token_ids) for each in completions])
    np.testing.assert_array_equal(watched.forwards, [each.num_forwards for each in completions])
    np.testing.assert_array_equal(watched.verified.sum(1), [each.verified_by_depth for each in completions])
    rates = watched.accept_probs.sum((1, 2)) / watched.verified.sum((1, 2))
    np.testing.assert_allclose(rates, [each.acceptance_rate for each in completions], rtol=1e-5)
    by_kind = watched.verified.sum((0, 2))
    # A refusal leaves a cold start with one group, and a group of its own with all.
    assert by_kind[BONUS] > 0 and (by_kind[CORRECTION] > 0, by_kind[SEEN] > 0) == (branches > 1, branches == 1)


def test_a_kind_is_that_of_the_forward_before():
    """One prompt, step by step: a forward that commits all its drafts and one more is followed by a bonus's group."""
    lm, method = tiny_lm(), ISD(2, branches=2)
    watched = watch(lm, PROMPTS[:1], method, PARAMS[:1])
    (completion,) = idlm_jax.generate(lm, PROMPTS[:1], method, PARAMS[:1])
    accepted = completion.accepted_by_depth[0]
    # Every accepted draft is followed by a group behind a bonus, every refused one by one behind a correction; the
    # prefill adds a bonus, and the last forward's group is not drafted from.
    assert abs(int(watched.verified[0, BONUS, 0]) - accepted - 1) <= 1
    refused = completion.verified_by_depth[0] - accepted
    assert abs(int(watched.verified[0, CORRECTION, 0]) - refused) <= 1
    found = summary(watched)
    assert found["acceptance"]["mean"] == pytest.approx(completion.acceptance_rate, rel=1e-5)
    assert found["tokens_per_forward"]["mean"] == completion.tokens_per_forward
