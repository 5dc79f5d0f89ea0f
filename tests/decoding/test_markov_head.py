"""The Markov head corrects drafts and nothing else: what is committed is AR's, whatever the head says.

A random head is the hard case: it proposes what neither the base nor its adapter would.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from idlm_jax.config import LoraConfig
from idlm_jax.decoding import AR, ISD, SamplingParams, generate, step
from idlm_jax.decoding.baselines import TwoPass
from idlm_jax.decoding.loop import run_loop, run_prefill
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.decoding.test_distribution import FALSE_ALARM, FILTERED, PLAIN, SHAPED, p_value
from tests.decoding.twin import run_twin
from tests.support.tiny_model import random_prompts, randomize_adapter, sharpen, tiny_module

GREEDY = SamplingParams(max_tokens=24)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_k=7, top_p=0.9)
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    module = tiny_module(3, vocab_size=12, mask_token_id=11, lora=LORA, markov_rank=4)
    return from_module(randomize_adapter(sharpen(module, 4.0)))


@pytest.fixture(scope="module")
def of_five_ids() -> LanguageModel:
    """As in test_distribution.py, and with a head."""
    sizes = {"vocab_size": 6, "mask_token_id": 5, "hidden_size": 16, "head_dim": 8, "mlp_size": 16}
    module = sharpen(tiny_module(1, lora=LORA, markov_rank=4, **sizes), 20.0)
    module = randomize_adapter(module, scale=0.2)
    module.markov.columns[...] = module.markov.columns[...] * 5.0
    return from_module(module)


def ids(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize(
    "method",
    [
        ISD(stride=8, branches=3),
        *(
            pytest.param(method, marks=pytest.mark.proof)
            for method in (ISD(4), ISD(4, branches=4), TwoPass(4), ISD("auto", branches="auto"))
        ),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_ar(lm, method):
    prompts = random_prompts(200, 20, 11)
    found = generate(lm, prompts, method, GREEDY, batch_size=256)
    assert ids(found) == ids(generate(lm, prompts, AR(), GREEDY, batch_size=256))
    accepted = sum(sum(completion.accepted_by_depth) for completion in found)
    verified = sum(sum(completion.verified_by_depth) for completion in found)
    assert 0.02 < accepted / verified < 0.95


@pytest.mark.proof
def test_bitwise_tokens_and_logits_are_those_of_ar(lm):
    prompts = random_prompts(12, 20, 11)
    isd, ar = (generate(lm, prompts, method, GREEDY, deterministic="bitwise") for method in (ISD(stride=4), AR()))
    assert [(each.token_ids, each.logit_checksums) for each in isd] == [
        (each.token_ids, each.logit_checksums) for each in ar
    ]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "method", [ISD(stride=4, rows=8), pytest.param(ISD(stride=4), marks=pytest.mark.proof)], ids=str
)
def test_compiled_loop_equals_python_loop_without_cache(lm, method, params):
    """Each MASK is told the draft before it, the first one the token that verification ended with."""
    prompts = random_prompts(6, 12, 11, seed=2)
    requests = [dataclasses.replace(params, seed=index) for index in range(len(prompts))]
    for completion, prompt, wanted in zip(generate(lm, prompts, method, requests), prompts, requests, strict=True):
        twin = run_twin(lm, prompt, method, wanted)
        assert (completion.token_ids, completion.num_forwards) == (twin.token_ids, twin.num_forwards)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        (ISD(stride=3), PLAIN),
        pytest.param(ISD(stride=4, branches=2), FILTERED, marks=pytest.mark.slow),
        pytest.param(ISD(stride=4, proposals="argmax"), PLAIN, marks=pytest.mark.proof),
        pytest.param(ISD(stride=3), SHAPED, marks=pytest.mark.proof),
        pytest.param(ISD(stride=3, branches=3), PLAIN, marks=pytest.mark.proof),
    ],
)
def test_samples_follow_the_causal_distribution(of_five_ids, method, params):
    assert p_value(of_five_ids, method, params) >= FALSE_ALARM


def test_verifying_against_what_the_mask_row_alone_says_fails_that_test(of_five_ids, monkeypatch):
    """The naive head: drafts are corrected, and the q that they are checked with is not."""
    in_turn = step._propose_in_turn

    def naive(module, plan, state, masks):
        proposals, _, _ = in_turn(module, plan, state, masks)
        return proposals, *step._propose(module, plan, state, masks.logits, 0)[1:]

    monkeypatch.setattr(step, "_propose_in_turn", naive)
    for program in (run_prefill, run_loop):
        program.clear_cache()
    try:
        assert p_value(of_five_ids, ISD(stride=3), PLAIN) < FALSE_ALARM**2
    finally:
        for program in (run_prefill, run_loop):
            program.clear_cache()


def test_coupled_samples_are_those_of_ar(lm):
    prompts = random_prompts(24, 20, 11)
    params = [dataclasses.replace(SAMPLED, seed=seed) for seed in range(24)]
    isd = generate(lm, prompts, ISD(stride=4, branches=2, rule="coupled"), params)
    assert ids(isd) == ids(generate(lm, prompts, AR(), params))


def test_a_new_head_changes_no_draft(lm):
    """Its columns are zero: forwards, and not tokens alone, are those of the model without it."""
    module = nnx.merge(lm.graph, jax.tree.map(jnp.copy, lm.params))
    module.markov.columns[...] = jnp.zeros_like(module.markov.columns[...])
    plain = tiny_module(3, vocab_size=12, mask_token_id=11, lora=LORA)
    plain = nnx.merge(nnx.split(plain)[0], nnx.filter_state(lm.params, lambda path, _: "markov" not in path))
    prompts = random_prompts(16, 20, 11)
    params = [dataclasses.replace(SAMPLED, seed=seed) for seed in range(16)]
    fresh, without, random = (
        [(each.token_ids, each.num_forwards) for each in generate(each_lm, prompts, ISD(stride=4), params)]
        for each_lm in (from_module(module), from_module(plain), lm)
    )
    assert fresh == without
    assert fresh != random


def test_the_token_before_matters_and_the_size_of_a_hidden_state_does_not(lm):
    module = lm.module
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 32)), jnp.float32)
    before = jnp.asarray([[1, 2]], jnp.int32)
    features = module.markov_features(hidden, before)
    np.testing.assert_allclose(module.markov_features(3.0 * hidden, before), features, rtol=1e-3, atol=1e-5)
    assert float(jnp.max(jnp.abs(module.markov_features(hidden, before[:, ::-1]) - features))) > 0.01
