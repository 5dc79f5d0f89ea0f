"""Block diffusion and two-pass decoding in the engine say what `generate` says, whatever else is served."""

import dataclasses

import pytest

from idlm_jax.decoding import BlockDiffusion, SamplingParams, TwoPass, generate
from serve.config import EngineConfig
from serve.device import Device
from serve.engine import Engine
from tests.serve.conftest import CONFIG
from tests.support.tiny_model import random_prompts

BLOCKS = dataclasses.replace(
    CONFIG, method=BlockDiffusion(4, threshold=0.3), decode_batches=(4,), prefill_shapes=((1, 16),)
)
PROMPTS = random_prompts(24, 40, 11, seed=1)
PARAMS = [
    SamplingParams(max_tokens=9 + seed % 7, temperature=0.5 * (seed % 3), top_k=(seed % 3) * 4, seed=seed)
    for seed in range(24)
]


def run(lm, config: EngineConfig, device: Device, prompts=PROMPTS, params=PARAMS) -> tuple[list[list[int]], Engine]:
    device.reset()
    with Engine(lm, config, device=device, after_step=lambda it: it.check()) as engine:
        handles = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
        return [handle.result()[0] for handle in handles], engine


@pytest.fixture(scope="module")
def device(lm) -> Device:
    return Device(lm, BLOCKS)


@pytest.mark.parametrize("num_pages", [65, 13], ids=["roomy", "preempting"])
def test_the_engine_says_what_generate_says(lm, device, num_pages):
    tokens, engine = run(lm, dataclasses.replace(BLOCKS, num_pages=num_pages), device)
    wanted = generate(lm, PROMPTS, BLOCKS.method, PARAMS)
    assert tokens == [each.token_ids for each in wanted]
    stats = engine.stats()
    assert (stats.num_preemptions > 0) == (num_pages == 13)
    assert stats.num_committed == sum(map(len, tokens))
    if num_pages == 65:
        assert stats.tally.forwards == sum(each.num_forwards for each in wanted)


def test_cached_prefixes_change_nothing(lm, device):
    """Pages hold whole blocks, so what is cached does not depend on tokens behind it."""
    long = [*PROMPTS[0], *PROMPTS[1]][:33]
    prompts = [long, long[:25], long[:27], long]
    params = [SamplingParams(max_tokens=12, seed=seed, temperature=0.5) for seed in range(4)]
    device.reset()
    with Engine(lm, BLOCKS, device=device, after_step=lambda it: it.check()) as engine:
        tokens = [engine.submit(*each).result()[0] for each in zip(prompts, params, strict=True)]
        assert engine.stats().num_cached_tokens == 3 * 24 + 8
    assert tokens == [each.token_ids for each in generate(lm, prompts, BLOCKS.method, params)]


def test_two_passes_in_the_engine(lm):
    config = dataclasses.replace(BLOCKS, method=TwoPass(3))
    tokens, engine = run(lm, config, Device(lm, config), PROMPTS[:12], PARAMS[:12])
    wanted = generate(lm, PROMPTS[:12], config.method, PARAMS[:12])
    assert tokens == [each.token_ids for each in wanted]
    assert engine.stats().tally.cold_starts == sum(each.num_cold_starts for each in wanted) > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shapes": True}, "penalties"),
        ({"max_logprobs": 2}, "log-probabilities"),
        ({"method": BlockDiffusion(3)}, "must divide"),
        ({"method": BlockDiffusion(16)}, "must divide"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BLOCKS, **wrong)
