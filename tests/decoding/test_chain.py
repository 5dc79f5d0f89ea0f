"""Tokens per forward from acceptance: published figures, closed cases, and windows drawn one by one. No JAX."""

import math
import random

import numpy as np
import pytest

from idlm_jax.decoding.baselines import TwoPass
from idlm_jax.decoding.chain import chain_of, expected_forwards, tokens_per_forward
from idlm_jax.decoding.method import AR, ISD

# What the windows are drawn with, per depth, and what decodes.
CASES = [
    ([0.9], ISD(2)),
    ([0.42, 0.43, 0.54], ISD(4)),
    ([0.9, 0.3, 0.8], ISD(4, branches=2)),
    ([0.2, 0.9, 0.9], ISD(4, rows=7)),
    ([0.6, 0.7, 0.5], ISD(4, rows=5)),
    ([0.42, 0.43, 0.54], ISD(4, branches=4)),
    ([0.9, 0.8], TwoPass(3)),
]


@pytest.mark.parametrize(
    ("acceptance", "method", "expected"),
    [
        # The paper's Table 3 inverted: N=4 has a TPF of 2.96 at p = 0.905, N=8 4.01 at 0.896; without cold starts it is
        # 1 + p + p^2 + ...
        ([0.905] * 3, ISD(4), 2.96),
        ([0.896] * 7, ISD(8), 4.01),
        ([0.905] * 3, ISD(4, branches=4), 1 + 0.905 + 0.905**2 + 0.905**3),
        # Drafting and verifying take turns: a token, then all that is accepted and one more.
        ([0.5, 0.5], TwoPass(3), (1 + 1.75) / 2),
        ([], AR(), 1.0),
        ([0.0, 0.0], ISD(3), 1.0),
        ([1.0, 1.0], ISD(3), 3.0),
        # 3 rows: a draft and one MASK, or two MASKs behind the pending token, of which stride 2 has one. The MASK goes
        # where it is the likelier to be of use: behind the draft at 0.6, in place of it at 0.4.
        ([0.6], ISD(2, rows=3), (1.6 + 0.4) / 1.4),
        ([0.4], ISD(2, rows=3), (1.4 + 0.4) / 1.4),
        # Room for every MASK.
        ([0.6, 0.7], ISD(3, rows=9), 1 + 0.6 + 0.42),
    ],
)
def test_the_chain_is_the_papers_formula(acceptance, method, expected):
    assert tokens_per_forward(chain_of(np.array(acceptance), method)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.83, 1.0])
@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_with_one_acceptance_it_is_the_formula_of_the_papers_project_page(stride, p):
    """(2 + p + ... + p^(N-2)) / (2 - p^(N-1)), introspective-diffusion.github.io, "Speedup Factor Explorer"."""
    wanted = (1 + sum(p**k for k in range(stride - 1))) / (2 - p ** (stride - 1))
    assert tokens_per_forward(chain_of(np.full(stride - 1, p), ISD(stride))) == pytest.approx(wanted)


def test_the_project_pages_compute_efficiency():
    """ "I-DLM (N=4, p=0.9): TPF 2.9, 7 queries per forward, 2.9^2 / 7 = 1.22"."""
    tpf = tokens_per_forward(chain_of(np.full(3, 0.9), ISD(4)))
    assert tpf**2 / ISD(4).window_len == pytest.approx(1.22, abs=0.005)


def test_completions_of_drafts_that_are_never_or_always_accepted():
    lengths = np.arange(1, 30)
    np.testing.assert_allclose(expected_forwards(chain_of(np.zeros(3), ISD(4)), lengths), lengths)
    # The prefill commits one token; each window commits four, the last what is left.
    always = expected_forwards(chain_of(np.ones(3), ISD(4)), lengths)
    np.testing.assert_allclose(always, 1 + np.ceil((lengths - 1) / 4))
    np.testing.assert_allclose(expected_forwards(chain_of(np.zeros(0), AR()), lengths), lengths)


def masks_behind(acceptance: list[float], method: ISD | TwoPass, num_drafts: int) -> list[int]:
    """MASKs behind each prefix of so many drafts."""
    num_masks, every = len(acceptance), range(num_drafts + 1)
    if isinstance(method, TwoPass):
        return [num_masks] if num_drafts == 0 else [0] * len(every)
    if not method.places_masks:
        return [num_masks if method.branches > 1 or prefix == num_drafts else 0 for prefix in every]

    def worth(mask: tuple[int, int]) -> float:
        prefix, depth = mask
        refused = 1 - acceptance[prefix] if prefix < num_drafts else 1.0
        return math.prod(acceptance[:prefix]) * refused * math.prod(acceptance[: depth + 1])

    masks = sorted(((prefix, depth) for prefix in every for depth in range(num_masks)), key=worth, reverse=True)
    chosen = [prefix for prefix, _ in masks[: method.window_len - 1 - num_drafts]]
    return [chosen.count(prefix) for prefix in every]


def drawn_forwards(lengths: list[list[int]], acceptance: list[float], length: int, rng: random.Random) -> int:
    """Forwards of one completion, decided draft by draft."""
    committed, forwards, num_drafts = 1, 1, len(acceptance)  # behind the prefill
    while committed < length:
        accepted = 0
        while accepted < num_drafts and rng.random() < acceptance[accepted]:
            accepted += 1
        num_drafts = lengths[num_drafts][accepted]
        committed, forwards = committed + accepted + 1, forwards + 1
    return forwards


@pytest.mark.parametrize(("acceptance", "method"), CASES, ids=str)
def test_expected_forwards_are_the_mean_of_drawn_ones(acceptance, method):
    """False alarm about 1e-5 a length: 4.5 standard errors of 4,000 draws."""
    rng, lengths = random.Random(0), np.array([1, 2, 7, 40])
    found = expected_forwards(chain_of(np.array(acceptance), method), lengths)
    masks = [masks_behind(acceptance, method, num_drafts) for num_drafts in range(len(acceptance) + 1)]
    for length, expected in zip(lengths.tolist(), found, strict=True):
        drawn = [drawn_forwards(masks, acceptance, length, rng) for _ in range(4000)]
        assert abs(np.mean(drawn) - expected) <= 4.5 * np.std(drawn) / np.sqrt(len(drawn))


@pytest.mark.parametrize(("acceptance", "method"), CASES, ids=str)
def test_a_longer_completion_comes_closer_to_the_endless_one(acceptance, method):
    chain, length = chain_of(np.array(acceptance), method), np.array([10, 100, 10_000])
    endless = tokens_per_forward(chain)
    off = endless - length / expected_forwards(chain, length)
    assert off[0] > off[1] > off[2] > 0
    assert off[2] < 1e-3


def test_more_rows_are_more_tokens():
    acceptance = np.array([0.6, 0.65, 0.5])
    found = [float(tokens_per_forward(chain_of(acceptance, ISD(4, rows=rows)))) for rows in range(5, 17)]
    assert found == sorted(found)
    assert found[2] > tokens_per_forward(chain_of(acceptance, ISD(4)))  # at as many rows
    assert found[-1] == pytest.approx(tokens_per_forward(chain_of(acceptance, ISD(4, branches=4))))


def test_chains_side_by_side_are_each_their_own():
    acceptance = np.random.default_rng(0).random((5, 3))
    method = ISD(4, branches=2)
    together = chain_of(acceptance, method)
    lengths = np.array([3, 20])
    for row, each in enumerate(acceptance):
        alone = chain_of(each, method)
        np.testing.assert_allclose(tokens_per_forward(together)[row], tokens_per_forward(alone))
        np.testing.assert_allclose(expected_forwards(together, lengths)[row], expected_forwards(alone, lengths))
