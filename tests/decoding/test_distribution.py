"""ISD samples are distributed as AR's: chi-square against the exhaustive distribution of all continuations.

Each test passes when the p-value is at least 1e-5, so a right implementation with fresh seeds would raise a false alarm
once in 100,000 runs per case; the seeds are fixed, so a case that passes keeps passing.
"""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2

from idlm_jax.config import LoraConfig
from idlm_jax.decoding import AR, ISD, SamplingParams, generate
from idlm_jax.decoding.method import method_name
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.decoding.twin import dense_probs, shaped
from tests.support.tiny_model import randomize_adapter, sharpen, tiny_module

FALSE_ALARM = 1e-5
PROMPT = [1, 3, 0, 2]
LENGTH = 4
SAMPLES = 4096
PLAIN = SamplingParams(max_tokens=LENGTH, temperature=1.0)
SHAPED = SamplingParams(
    max_tokens=LENGTH,
    temperature=1.5,
    top_k=4,
    min_p=0.02,
    presence_penalty=0.7,
    frequency_penalty=0.5,
    repetition_penalty=1.3,
    logit_bias=((2, 1.5), (4, -1.0)),
)
FILTERED = SamplingParams(max_tokens=LENGTH, temperature=1.3, top_k=3, top_p=0.85)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """Five real ids and an adapter that drafts unlike the base: q far from p is the hard case."""
    lora = LoraConfig(rank=4, alpha=8.0)
    module = tiny_module(1, vocab_size=6, mask_token_id=5, hidden_size=16, head_dim=8, mlp_size=16, lora=lora)
    return from_module(randomize_adapter(sharpen(module, 20.0), scale=0.2))


def exact_distribution(lm: LanguageModel, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Probability of every continuation, from dense logits of every prefix."""
    probs: dict[tuple[int, ...], float] = {(): 1.0}
    vocab_size, mask_id = lm.config.vocab_size, lm.config.mask_token_id
    for length in range(LENGTH):
        prefixes = [key for key in probs if len(key) == length]
        logits = np.asarray(lm.logits(np.array([PROMPT + list(prefix) for prefix in prefixes], np.int32)))[:, -1]
        for prefix, row in zip(prefixes, logits, strict=True):
            p = dense_probs(shaped(row, params, PROMPT, list(prefix), set(params.stop_token_ids)), params, mask_id)
            for token in range(vocab_size):
                probs[*prefix, token] = probs[prefix] * p[token]
    return {key: value for key, value in probs.items() if len(key) == LENGTH}


def p_value(lm: LanguageModel, method: AR | ISD, params: SamplingParams) -> float:
    """Chi-square tail of SAMPLES completions; cells expected fewer than five times are pooled."""
    expected = exact_distribution(lm, params)
    requests = [SamplingParams(**{**vars(params), "seed": seed}) for seed in range(SAMPLES)]
    completions = generate(lm, [PROMPT] * SAMPLES, method, requests, batch_size=SAMPLES)
    observed = Counter(tuple(completion.token_ids) for completion in completions)
    impossible = sum(count for key, count in observed.items() if expected[key] == 0)
    if impossible:
        return 0.0
    big = [key for key in expected if expected[key] * SAMPLES >= 5]
    cells = [(observed[key], expected[key] * SAMPLES) for key in big]
    rest = SAMPLES - sum(mass for _, mass in cells)
    if rest > 5:
        cells.append((SAMPLES - sum(count for count, _ in cells), rest))
    statistic = sum((count - mass) ** 2 / mass for count, mass in cells)
    assert len(cells) >= 20  # a test over few cells would see little
    return float(chi2.sf(statistic, len(cells) - 1))


ALWAYS = [
    (AR(), PLAIN),
    (ISD(3), PLAIN),
    (ISD(3), FILTERED),
    (ISD(4, rows=7), PLAIN),
    (ISD(4, rows=7), FILTERED),
    (ISD(4, branches=4, proposals="argmax"), FILTERED),
]
METHODS = [AR(), ISD(2), ISD(4), ISD(4, branches=2), ISD(2, rows=3), ISD(3, branches=3)]
METHODS += [ISD(stride, proposals="argmax", branches=branches) for stride, branches in ((3, 1), (4, 1), (4, 4))]


@pytest.mark.parametrize(
    ("method", "params"),
    [
        *ALWAYS,
        *(
            pytest.param(method, params, marks=pytest.mark.proof)
            for method, params in itertools.product(METHODS, (PLAIN, FILTERED))
            if (method, params) not in ALWAYS
        ),
    ],
    ids=lambda each: {PLAIN: "plain", FILTERED: "top_k_top_p"}.get(each) or method_name(each),
)
def test_samples_follow_the_causal_distribution(lm, method, params):
    assert p_value(lm, method, params) >= FALSE_ALARM


@pytest.mark.parametrize("method", [AR(), ISD(stride=3), ISD(stride=4, proposals="argmax")], ids=str)
def test_samples_follow_the_distribution_that_penalties_and_biases_leave(lm, method):
    """Each row of a window is shaped by the drafts before it; rows shaped by the committed tokens alone fail this."""
    assert p_value(lm, method, SHAPED) >= FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("params", [PLAIN, pytest.param(FILTERED, marks=pytest.mark.proof)])
def test_the_official_rule_fails_the_same_test(lm, params):
    """Argmax proposals with a soft q sharpen towards the argmax; a test that let it pass would prove nothing."""
    assert p_value(lm, ISD(stride=3, proposals="argmax", rule="official"), params) < FALSE_ALARM**2


@pytest.mark.proof
@pytest.mark.parametrize("method", [ISD(stride=3, rule="coupled"), ISD(stride="auto", branches="auto")], ids=str)
def test_coupled_samples_follow_it_too(lm, method):
    """They are AR's own (test_coupled.py), so this is the same claim twice."""
    assert p_value(lm, method, FILTERED) >= FALSE_ALARM


def test_exact_distribution_sums_to_one_over_all_sequences(lm):
    expected = exact_distribution(lm, PLAIN)
    assert len(expected) == len(list(itertools.product(range(6), repeat=LENGTH)))
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-9)
