"""The decode loop with each kernel in place of the reference, interpreted: the same tokens."""

import dataclasses

import pytest

from idlm_jax.decoding.generate import generate
from idlm_jax.decoding.method import AR, ISD
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import from_module
from pallas_kernels.bodies import BY_NAME, Body
from tests.support.tiny_model import sharpen, tiny_module

PROMPTS = [[1, 5, 2, 9, 3], [7, 7]]


@pytest.fixture(scope="module")
def expected():
    lm = from_module(sharpen(tiny_module(3), 4.0))
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=9, temperature=0.8, seed=4)]
    return [generate(lm, PROMPTS, method, params) for method in (AR(), ISD(stride=3))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", pytest.param("tpu", marks=pytest.mark.proof)])
def test_tokens_do_not_depend_on_the_kernels(name, expected):
    # Two of the TPU interpreter's kernels that may run at once can wait for each other forever on two cores.
    kernels = dataclasses.replace(BY_NAME[name], interpret=True)
    if name == "tpu":
        kernels = dataclasses.replace(kernels, verify=Body.REFERENCE)
    lm = from_module(sharpen(tiny_module(3, kernels=kernels), 4.0))
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=9, temperature=0.8, seed=4)]
    for method, wanted in zip((AR(), ISD(stride=3)), expected, strict=True):
        completions = generate(lm, PROMPTS, method, params)
        assert [each.token_ids for each in completions] == [each.token_ids for each in wanted]
        assert [each.num_forwards for each in completions] == [each.num_forwards for each in wanted]
