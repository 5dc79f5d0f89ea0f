"""Values that a request may not ask for."""

import pytest

from idlm_jax.decoding import SamplingParams


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
        {"min_tokens": -1},
        {"min_tokens": 129},
        {"min_p": 1.1},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((-1, 0.5),)},
        {"logit_bias": ((1, float("nan")),)},
        {"logit_bias": tuple((token, 1.0) for token in range(301))},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)
