"""Greedy ISD is AR token for token; a request's tokens do not depend on its batch."""

import dataclasses

import numpy as np
import pytest

from idlm_jax.config import LoraConfig
from idlm_jax.decoding import AR, ISD, SamplingParams, generate
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.decoding.twin import run_twin
from tests.support.tiny_model import random_prompts, randomize_adapter, sharpen, tiny_module

GREEDY = SamplingParams(max_tokens=24)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_k=7, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def idlm() -> LanguageModel:
    """Eleven real ids, so that a random model's drafts are right often enough to exercise acceptance."""
    return from_module(sharpen(tiny_module(3, vocab_size=12, mask_token_id=11), 4.0))


@pytest.fixture(scope="module")
def r_isd() -> LanguageModel:
    lora = LoraConfig(rank=4, alpha=8.0)
    return from_module(randomize_adapter(sharpen(tiny_module(3, vocab_size=12, mask_token_id=11, lora=lora), 4.0)))


def ids(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("stride", [*(pytest.param(stride, marks=pytest.mark.proof) for stride in (2, 3)), 4, 8])
@pytest.mark.parametrize("name", [pytest.param("idlm", marks=pytest.mark.proof), "r_isd"])
def test_greedy_isd_equals_ar_on_200_prompts(name, stride, request):
    lm = request.getfixturevalue(name)
    prompts = random_prompts(200, 20, 11)
    ar = generate(lm, prompts, AR(), GREEDY, batch_size=256)
    isd = generate(lm, prompts, ISD(stride=stride), GREEDY, batch_size=256)
    assert ids(isd) == ids(ar)
    # The claim would be empty if no draft ever survived, or none was ever refused.
    accepted = sum(sum(completion.accepted_by_depth) for completion in isd)
    verified = sum(sum(completion.verified_by_depth) for completion in isd)
    assert 0.05 < accepted / verified < 0.95
    assert sum(c.num_forwards for c in isd) < sum(c.num_forwards for c in ar)


@pytest.mark.parametrize(
    "method",
    [
        ISD(4, branches=4),
        ISD(8, rows=15),
        *(
            pytest.param(method, marks=pytest.mark.proof)
            for method in (ISD(2, branches=2), ISD(8, branches=8), ISD(8, branches=3), ISD(4, rows=5), ISD(2, rows=3))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [pytest.param("idlm", marks=pytest.mark.proof), "r_isd"])
def test_masks_behind_other_prefixes_change_no_greedy_token_and_save_forwards(name, method, request):
    lm = request.getfixturevalue(name)
    prompts = random_prompts(200, 20, 11)
    ar = generate(lm, prompts, AR(), GREEDY, batch_size=256)
    plain = generate(lm, prompts, ISD(method.stride), GREEDY, batch_size=256)
    branched = generate(lm, prompts, method, GREEDY, batch_size=256)
    assert ids(branched) == ids(ar)
    assert sum(c.num_forwards for c in branched) < sum(c.num_forwards for c in plain)
    cold = sum(c.num_cold_starts for c in branched)
    assert cold == 0 if method.branches == method.stride else 0 < cold < sum(c.num_cold_starts for c in plain)


def test_r_isd_equals_the_base_model_without_its_adapter(r_isd, idlm):
    """Same seed, so `idlm` holds the base weights of `r_isd`."""
    prompts = random_prompts(32, 20, 11, seed=1)
    assert ids(generate(r_isd, prompts, ISD(stride=4), GREEDY)) == ids(generate(idlm, prompts, AR(), GREEDY))
    # and its drafts do come from the adapter
    assert [c.num_forwards for c in generate(r_isd, prompts, ISD(stride=4), GREEDY)] != [
        c.num_forwards for c in generate(idlm, prompts, ISD(stride=4), GREEDY)
    ]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "method",
    [
        ISD(stride=4),
        ISD(stride=4, rows=7),
        *(
            pytest.param(method, marks=pytest.mark.proof)
            for method in (
                AR(),
                ISD(stride=2),
                ISD(stride=4, proposals="argmax"),
                ISD(stride=4, branches=4),
                ISD(8, rows=19),
            )
        ),
    ],
    ids=str,
)
def test_compiled_loop_equals_python_loop_without_cache(r_isd, method, params):
    prompts = random_prompts(6, 12, 11, seed=2)
    requests = [dataclasses.replace(params, seed=index) for index in range(len(prompts))]
    compiled = generate(r_isd, prompts, method, requests)
    for completion, prompt, wanted in zip(compiled, prompts, requests, strict=True):
        twin = run_twin(r_isd, prompt, method, wanted)
        assert (completion.token_ids, completion.num_forwards) == (twin.token_ids, twin.num_forwards)


@pytest.mark.parametrize("stride", [*(pytest.param(stride, marks=pytest.mark.slow) for stride in (1, 2, 16)), 5])
def test_every_stride_decodes(idlm, stride):
    prompts = random_prompts(3, 9, 11, seed=4)
    assert ids(generate(idlm, prompts, ISD(stride=stride), GREEDY)) == ids(generate(idlm, prompts, AR(), GREEDY))


@pytest.mark.proof
def test_a_request_is_the_same_alone_and_in_any_batch(r_isd):
    prompts = random_prompts(8, 30, 11, seed=5)
    params = [
        SamplingParams(
            max_tokens=5 + 3 * i,
            temperature=0.4 * (i % 4),
            top_k=3 * (i % 3),
            top_p=1 - 0.1 * (i % 2),
            seed=i,
        )
        for i in range(len(prompts))
    ]
    together = ids(generate(r_isd, prompts, ISD(stride=4), params))
    alone = [generate(r_isd, [p], ISD(stride=4), [s])[0].token_ids for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = generate(r_isd, [prompts[i] for i in order], ISD(stride=4), [params[i] for i in order], batch_size=5)
    assert ids(shuffled) == [together[i] for i in order]


def test_a_request_that_stops_early_changes_no_other(idlm):
    prompts = random_prompts(8, 10, 11, seed=6)
    params = [SamplingParams(max_tokens=40, temperature=1.0, seed=i) for i in range(8)]
    before = generate(idlm, prompts, ISD(stride=4), params)
    stop = before[2].token_ids[3]
    params[2] = dataclasses.replace(params[2], stop_token_ids=(stop,))
    after = generate(idlm, prompts, ISD(stride=4), params)
    first = before[2].token_ids.index(stop)
    assert after[2].token_ids == before[2].token_ids[: first + 1]
    assert (after[2].finish_reason, before[2].finish_reason) == ("stop", "length")
    assert [ids(after)[i] for i in range(8) if i != 2] == [ids(before)[i] for i in range(8) if i != 2]


def test_max_tokens_cuts_inside_a_window_and_is_a_prefix(idlm):
    prompts = random_prompts(4, 10, 11, seed=7)
    long = ids(generate(idlm, prompts, ISD(stride=8), GREEDY))
    for budget in (1, 2, 3, 7):
        short = generate(idlm, prompts, ISD(stride=8), SamplingParams(max_tokens=budget))
        assert ids(short) == [tokens[:budget] for tokens in long]
        assert {completion.finish_reason for completion in short} == {"length"}


def test_stride_one_samples_exactly_the_tokens_of_ar(idlm):
    prompts = random_prompts(8, 10, 11, seed=8)
    assert ids(generate(idlm, prompts, ISD(stride=1), SAMPLED)) == ids(generate(idlm, prompts, AR(), SAMPLED))


def test_the_mask_id_is_never_generated(idlm):
    module = idlm.module
    hot = SamplingParams(max_tokens=64, temperature=50.0)
    completions = generate(
        idlm, random_prompts(16, 5, 11), ISD(stride=4), [dataclasses.replace(hot, seed=i) for i in range(16)]
    )
    drawn = {token for tokens in ids(completions) for token in tokens}
    assert drawn == set(range(module.config.vocab_size)) - {module.config.mask_token_id}
