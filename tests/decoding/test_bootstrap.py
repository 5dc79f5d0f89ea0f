"""Intervals: they cover what is true as often as they say."""

import numpy as np
import pytest

from idlm_jax.decoding.bootstrap import RESAMPLES, estimate, ratio, resampled


def test_an_interval_covers_the_true_ratio_about_as_often_as_it_says():
    """300 data sets of 40 prompts whose tokens per forward differ. 95 % is 285; the percentile bootstrap falls a little
    short with 40, so 93 % is expected, and fewer than 264 or more than 297 have a probability below 1e-4."""
    rng, covered = np.random.default_rng(0), 0
    weights = resampled([40])
    for _ in range(300):
        forwards = rng.integers(20, 60, 40)
        tokens = forwards + rng.binomial(forwards, rng.beta(4, 4, 40))  # 1.5 tokens per forward, some prompts easier
        found = ratio(tokens, forwards, weights)
        covered += found.low <= 1.5 <= found.high
    assert 264 <= covered <= 297


def test_a_resample_draws_each_domain_as_often_as_it_has_prompts():
    weights = resampled([3, 5])
    assert weights.shape == (RESAMPLES, 8)
    np.testing.assert_array_equal(weights[:, :3].sum(1), 3)
    np.testing.assert_array_equal(weights[:, 3:].sum(1), 5)
    # Each prompt once on average: 5 standard errors of a weight, whose variance is at most 1.
    np.testing.assert_allclose(weights.mean(0), 1, atol=5 / np.sqrt(RESAMPLES))


def test_domains_that_differ_do_not_widen_the_interval():
    values, ones = np.array([1.0, 1.0, 9.0, 9.0]), np.ones(4)
    apart = ratio(values, ones, resampled([2, 2]))
    together = ratio(values, ones, resampled([4]))
    assert (apart.low, apart.value, apart.high) == (5, 5, 5)
    assert together.low < 5 < together.high


def test_resamples_without_a_count_are_left_out_and_no_count_at_all_is_no_estimate():
    rare = ratio(np.array([1.0, 0.0, 0.0]), np.array([2, 0, 0]), resampled([3]))
    assert (rare.low, rare.value, rare.high) == (0.5, 0.5, 0.5)
    assert ratio(np.zeros(3), np.zeros(3), resampled([3])) is None


def test_equal_seeds_give_equal_intervals():
    values = np.random.default_rng(1).random(10)
    assert ratio(values, np.ones(10), resampled([10], 3)) == ratio(values, np.ones(10), resampled([10], 3))
    assert ratio(values, np.ones(10), resampled([10], 3)) != ratio(values, np.ones(10), resampled([10], 4))


def test_a_statistic_sees_all_prompts_once_for_its_value():
    seen = []
    estimate(lambda weights: seen.append(weights) or weights.sum(1), resampled([4]))
    np.testing.assert_array_equal(seen[0], np.ones((1, 4)))


@pytest.mark.parametrize("size", [2, 7])
def test_an_interval_holds_its_value_for_prompts_that_agree(size):
    found = ratio(np.full(size, 6), np.full(size, 4), resampled([size]))
    assert (found.low, found.value, found.high) == (1.5, 1.5, 1.5)
