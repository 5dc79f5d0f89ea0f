"""The transform of logits against a sort in Python, and designed refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.decoding import SamplingParams
from idlm_jax.decoding.sampling import SamplingState, remove_token, target_probs
from tests.decoding.twin import dense_probs


def state(params: list[SamplingParams]) -> SamplingState:
    return SamplingState(
        jnp.array([p.temperature for p in params], jnp.float32),
        jnp.array([p.top_k for p in params], jnp.int32),
        jnp.array([p.top_p for p in params], jnp.float32),
        jnp.array([p.seed for p in params], jnp.uint32),
    )


PARAMS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature in (0.0, 0.3, 1.0, 2.5)
    for top_k in (0, 1, 5, 1000)
    for top_p in (1.0, 0.9, 0.3, 1e-6)
]


def test_probabilities_equal_a_python_sort_for_every_combination():
    logits = np.random.default_rng(0).normal(size=(len(PARAMS), 2, 40)).astype(np.float32) * 3
    probs = target_probs(remove_token(jnp.asarray(logits), 17), state(PARAMS), filtered=True)
    for row, params in enumerate(PARAMS):
        for t in range(2):
            np.testing.assert_allclose(probs[row, t], dense_probs(logits[row, t], params, 17), atol=2e-6)


def test_rows_without_filters_have_the_same_bits_with_and_without_the_sort():
    params = [SamplingParams(temperature=t) for t in (0.0, 0.7, 1.0)]
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 1000)).astype(np.float32) * 5)
    sorted_too = target_probs(logits, state(params), filtered=True)
    np.testing.assert_array_equal(target_probs(logits, state(params), filtered=False), sorted_too)


def test_tiny_temperatures_become_greedy_without_nan():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 50)).astype(np.float32))
    params = [SamplingParams(temperature=1e-30), SamplingParams(temperature=0.0)]
    probs = np.asarray(target_probs(logits[:1].repeat(2, axis=0), state(params), filtered=False))
    np.testing.assert_array_equal(probs[0], probs[1])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_tokens": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"stop_token_ids": (-3,)},
        {"logprobs": 21},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)
