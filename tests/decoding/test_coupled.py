"""Coupled and "auto" ISD say, for every seed, what AR says: token for token, whatever was drafted or chosen."""

import sys

import pytest

from idlm_jax.config import LoraConfig
from idlm_jax.decoding import AR, ISD, SamplingParams, generate, stream_tokens
from idlm_jax.decoding.loop import run_loop
from idlm_jax.decoding.pacing import Pacer
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.support.tiny_model import random_prompts, randomize_adapter, sharpen, tiny_module

AUTO = ISD(stride="auto", branches="auto")
# AR, stride 2 with a branch behind each prefix, stride 4 with two placed ones.
SHORT = ISD(stride="auto", branches=2)
# Greedy and sampled, filtered and not, side by side in one batch.
PARAMS = [
    SamplingParams(
        max_tokens=12 + seed % 9,
        temperature=0.5 * (seed % 4),
        top_k=4 * (seed % 3),
        top_p=1.0 - 0.1 * (seed % 2),
        seed=seed,
    )
    for seed in range(48)
]
PROMPTS = random_prompts(len(PARAMS), 20, 11)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    lora = LoraConfig(rank=4, alpha=8.0)
    module = sharpen(tiny_module(3, vocab_size=12, mask_token_id=11, lora=lora), 4.0)
    return from_module(randomize_adapter(module))


def ids(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def ar(lm) -> list[list[int]]:
    return ids(generate(lm, PROMPTS, AR(), PARAMS))


@pytest.mark.parametrize(
    "method",
    [
        ISD(stride=4, rows=7, rule="coupled"),
        pytest.param(AUTO, marks=pytest.mark.proof),
        pytest.param(ISD(stride=3, rule="coupled"), marks=pytest.mark.slow),
        pytest.param(ISD(stride=3, rule="coupled", proposals="argmax"), marks=pytest.mark.proof),
        pytest.param(ISD(stride=8, rule="coupled"), marks=pytest.mark.proof),
        pytest.param(ISD(stride=4, branches="auto"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_seeded_samples_are_those_of_ar(lm, ar, method):
    completions = generate(lm, PROMPTS, method, PARAMS)
    assert ids(completions) == ar
    # The claim would be empty if no draft ever survived, or none was ever refused.
    accepted, verified = (
        sum(sum(getattr(each, name)) for each in completions) for name in ("accepted_by_depth", "verified_by_depth")
    )
    assert 0.02 < accepted / verified < 0.95


def test_the_exact_rule_samples_other_tokens_than_ar(lm, ar):
    """Both are right; a test that could not tell them apart would prove nothing of coupling."""
    assert ids(generate(lm, PROMPTS, ISD(stride=4), PARAMS)) != ar


def test_shared_noise_makes_drafts_agree_more_often(lm):
    """Against drafts whose noise has nothing to do with the row that checks them."""
    params = [SamplingParams(max_tokens=24, temperature=1.0, seed=seed) for seed in range(64)]
    prompts = random_prompts(64, 20, 11, seed=1)

    def num_forwards(method: ISD) -> int:
        return sum(each.num_forwards for each in generate(lm, prompts, method, params))

    assert num_forwards(ISD(stride=2, rule="coupled")) < 0.99 * num_forwards(
        ISD(stride=2, rule="coupled", proposals="argmax")
    )


class Cycle(Pacer):
    """Each of some methods in turn."""

    turns = (0,)

    def is_timed(self, batch: int, index: int) -> bool:
        return True

    def follow_seconds(self, batch: int, index: int, seconds: float) -> None: ...

    def choose(self, batch: int, forwards: int = 1) -> int:
        self.num_chosen = getattr(self, "num_chosen", -1) + 1
        return self.turns[self.num_chosen % len(self.turns)]


@pytest.fixture
def cycle(monkeypatch):
    # The package's name `generate` is the function, not the module.
    monkeypatch.setattr(sys.modules["idlm_jax.decoding.generate"], "Pacer", Cycle)
    monkeypatch.setattr("idlm_jax.decoding.auto.STRETCH", 1)
    return lambda *turns: monkeypatch.setattr(Cycle, "turns", turns)


# Every method of three is followed by every other and by itself.
EVERY_PAIR = (0, 0, 1, 0, 2, 1, 1, 2, 2)


def test_any_sequence_of_methods_says_the_same(lm, ar, cycle):
    """Drafts are left over and missing in every combination: from each method of the menu to each other."""
    cycle(*EVERY_PAIR)
    before = run_loop._cache_size()
    assert ids(generate(lm, PROMPTS, SHORT, PARAMS)) == ar
    compiled = run_loop._cache_size()
    assert compiled - before <= len(SHORT.menu)
    assert ids(generate(lm, PROMPTS, SHORT, PARAMS)) == ar
    assert run_loop._cache_size() == compiled


def test_a_short_stride_drafts_alike_where_there_is_room_for_a_longer_one(lm, cycle):
    """Tokens would be right with any drafts; how many forwards they take would not."""
    cycle(1)
    fixed = generate(lm, PROMPTS, SHORT.menu[1], PARAMS)
    among_others = generate(lm, PROMPTS, SHORT, PARAMS)
    # The prefill is the menu's longest, so the first forward already verifies the same first draft.
    assert [each.num_forwards for each in among_others] == [each.num_forwards for each in fixed]
    assert [each.accepted_by_depth[:1] for each in among_others] == [each.accepted_by_depth for each in fixed]


def test_no_draft_outlives_a_forward_of_ar(lm, cycle):
    cycle(0, 2)
    completions = generate(lm, PROMPTS, SHORT, PARAMS)
    assert sum(sum(each.verified_by_depth) for each in completions) == 0
    cycle(2, 0)  # but for the prefill's
    assert sum(sum(each.verified_by_depth) for each in generate(lm, PROMPTS, SHORT, PARAMS)) > 0


@pytest.mark.proof
def test_a_stream_of_auto_is_the_completion(lm, ar):
    assert [token for piece in stream_tokens(lm, PROMPTS[5], SHORT, PARAMS[5]) for token in piece] == ar[5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 0}, "or be 'auto'"),
        ({"stride": 4, "branches": 5}, r"1\.\.4"),
        ({"stride": "auto", "branches": 5}, r"1\.\.4"),
        ({"stride": 4, "rows": 4}, r"rows=4 must lie in 5\.\.16 at stride 4"),
        ({"stride": 4, "rows": 17}, "rows=17"),
        ({"stride": 1, "rows": 1}, "a stride of 1 drafts nothing"),
        ({"stride": 4, "rows": 7, "branches": 2}, "in place of branches=2"),
        ({"stride": "auto", "rows": 7}, "stride='auto' has several"),
        ({"stride": 4, "rows": 7, "branches": "auto"}, "in place of branches='auto'"),
        ({"stride": 4, "rows": 7, "proposals": "argmax", "rule": "official"}, "official"),
        ({"stride": "auto", "max_stride": 17}, "max_stride=17"),
        ({"stride": "auto", "rule": "official", "proposals": "argmax"}, "official"),
    ],
)
def test_impossible_choices_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ISD(**fields)


def test_menus():
    assert ISD(4).menu == (ISD(4),) and AR().menu == (AR(),)
    sizes = [(each.num_masks + 1, each.window_len) for each in AUTO.menu]
    assert sizes == [(1, 1), (2, 3), (2, 4), (4, 7), (4, 10), (4, 16)]
    assert [(each.window_len, each.places_masks, each.rule) for each in ISD(8, branches="auto").menu] == [
        (rows, True, "coupled") for rows in (15, 22, 36)
    ]
    assert all(not each.places_masks for each in ISD("auto").menu if isinstance(each, ISD))  # one group was asked for
    assert AUTO.window_len == 16 and ISD("auto").window_len == 7
