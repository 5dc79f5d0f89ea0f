"""Tokens per forward from acceptance: published figures, closed cases, and windows drawn one by one. No JAX."""

import random

import numpy as np
import pytest

from idlm_jax.decoding.chain import chain_of, expected_forwards, tokens_per_forward
from idlm_jax.decoding.method import ISD

# What the windows are drawn with, per depth, and the groups of MASKs.
CASES = [
    ([0.9], 1),
    ([0.42, 0.43, 0.54], 1),
    ([0.9, 0.3, 0.8], 2),
    ([0.2, 0.9, 0.9], 2),
    ([0.42, 0.43, 0.54], 4),
    ([0.9, 0.8], 0),
]


@pytest.mark.parametrize(
    ("acceptance", "branches", "expected"),
    [
        # The paper's Table 3 inverted: N=4 has a TPF of 2.96 at p = 0.905, N=8 4.01 at 0.896; without cold starts it is
        # 1 + p + p^2 + ...
        ([0.905] * 3, 1, 2.96),
        ([0.896] * 7, 1, 4.01),
        ([0.905] * 3, 4, 1 + 0.905 + 0.905**2 + 0.905**3),
        # Drafting and verifying take turns: a token, then all that is accepted and one more.
        ([0.5, 0.5], 0, (1 + 1.75) / 2),
        ([], 1, 1.0),
        ([0.0, 0.0], 1, 1.0),
        ([1.0, 1.0], 1, 3.0),
    ],
)
def test_the_chain_is_the_papers_formula(acceptance, branches, expected):
    assert tokens_per_forward(chain_of(np.array(acceptance), branches)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.83, 1.0])
@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_with_one_acceptance_it_is_the_formula_of_the_papers_project_page(stride, p):
    """(2 + p + ... + p^(N-2)) / (2 - p^(N-1)), introspective-diffusion.github.io, "Speedup Factor Explorer"."""
    wanted = (1 + sum(p**k for k in range(stride - 1))) / (2 - p ** (stride - 1))
    assert tokens_per_forward(chain_of(np.full(stride - 1, p), 1)) == pytest.approx(wanted)


def test_the_project_pages_compute_efficiency():
    """ "I-DLM (N=4, p=0.9): TPF 2.9, 7 queries per forward, 2.9^2 / 7 = 1.22"."""
    tpf = tokens_per_forward(chain_of(np.full(3, 0.9), 1))
    assert tpf**2 / ISD(4).window_len == pytest.approx(1.22, abs=0.005)


def test_completions_of_drafts_that_are_never_or_always_accepted():
    lengths = np.arange(1, 30)
    np.testing.assert_allclose(expected_forwards(chain_of(np.zeros(3), 1), lengths), lengths)
    # The prefill commits one token; each window commits four, the last what is left.
    always = expected_forwards(chain_of(np.ones(3), 1), lengths)
    np.testing.assert_allclose(always, 1 + np.ceil((lengths - 1) / 4))
    np.testing.assert_allclose(expected_forwards(chain_of(np.zeros(0), 1), lengths), lengths)


def drawn_forwards(acceptance: list[float], branches: int, length: int, rng: random.Random) -> int:
    """Forwards of one completion, decided draft by draft."""
    num_masks, committed, forwards, has_drafts = len(acceptance), 1, 1, True  # behind the prefill
    reached = [float(np.prod(acceptance[:depth])) for depth in range(num_masks + 1)]
    ends = [reached[depth] * (1 - acceptance[depth]) for depth in range(num_masks)] + [reached[-1]]
    likeliest = sorted(range(num_masks + 1), key=lambda depth: -ends[depth])
    groups = {num_masks} if branches == 1 else set(likeliest[:branches])
    while committed < length:
        accepted = 0
        while has_drafts and accepted < num_masks and rng.random() < acceptance[accepted]:
            accepted += 1
        has_drafts = not has_drafts or accepted in groups
        committed, forwards = committed + accepted + 1, forwards + 1
    return forwards


@pytest.mark.parametrize(("acceptance", "branches"), CASES)
def test_expected_forwards_are_the_mean_of_drawn_ones(acceptance, branches):
    """False alarm about 1e-5 a length: 4.5 standard errors of 4,000 draws."""
    rng, lengths = random.Random(0), np.array([1, 2, 7, 40])
    found = expected_forwards(chain_of(np.array(acceptance), branches), lengths)
    for length, expected in zip(lengths.tolist(), found, strict=True):
        drawn = [drawn_forwards(acceptance, branches, length, rng) for _ in range(4000)]
        assert abs(np.mean(drawn) - expected) <= 4.5 * np.std(drawn) / np.sqrt(len(drawn))


@pytest.mark.parametrize(("acceptance", "branches"), CASES)
def test_a_longer_completion_comes_closer_to_the_endless_one(acceptance, branches):
    chain, length = chain_of(np.array(acceptance), branches), np.array([10, 100, 10_000])
    endless = tokens_per_forward(chain)
    off = endless - length / expected_forwards(chain, length)
    assert off[0] > off[1] > off[2] > 0
    assert off[2] < 1e-3


def test_chains_side_by_side_are_each_their_own():
    acceptance = np.random.default_rng(0).random((5, 3))
    together = chain_of(acceptance, 2)
    lengths = np.array([3, 20])
    for row, each in enumerate(acceptance):
        alone = chain_of(each, 2)
        np.testing.assert_allclose(tokens_per_forward(together)[row], tokens_per_forward(alone))
        np.testing.assert_allclose(expected_forwards(together, lengths)[row], expected_forwards(alone, lengths))
