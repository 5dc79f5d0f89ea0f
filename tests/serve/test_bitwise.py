"""`EngineConfig(deterministic="bitwise")`: the bits of `generate` in that mode, whatever the engine does."""

import dataclasses
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from idlm_jax.config import LoraConfig
from idlm_jax.decoding import ISD, SamplingParams, generate
from idlm_jax.model.language_model import LanguageModel, from_module
from serve.config import EngineConfig
from serve.device import Device
from serve.mesh import serving_mesh
from tests.support.tiny_model import random_prompts, randomize_adapter, sharpen, tiny_module

# Pages for two requests and a half: the youngest are thrown out, and read again.
CONFIG = EngineConfig(
    method=ISD(stride=4),
    max_running=4,
    num_pages=6,
    max_len=128,
    decode_batches=(4,),
    prefill_shapes=((1, 48), (2, 32)),
    specialised=False,
    deterministic="bitwise",
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    bfloat16 = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    module = sharpen(tiny_module(3, vocab_size=12, mask_token_id=11, lora=LoraConfig(rank=4, alpha=8.0), **bfloat16), 4)
    return from_module(randomize_adapter(module, scale=0.1))


@pytest.fixture(scope="module", params=[1, 4])
def slots_per_tile(request) -> Iterator[int]:
    """One request a tile, as on a CPU; or several, as on an accelerator: then there are rows that nobody uses."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("serve.config", "idlm_jax.decoding.generate"):
            slots_of = lambda deterministic: None if deterministic is None else request.param  # noqa: E731
            patch.setattr(sys.modules[module], "group_slots_of", slots_of)
        yield request.param


@pytest.fixture(scope="module")
def device(lm: LanguageModel, slots_per_tile: int) -> Device:
    return Device(lm, CONFIG)


@pytest.mark.proof
def test_requests_under_load_have_the_tokens_and_logits_of_generate(lm, start):
    engine = start(CONFIG)
    prompts = [prompt * 60 for prompt in random_prompts(12, 60, 11)]
    # They grow into their second page at about the same time; two begin with the same page.
    prompts = [prompt[: 40 + index] for index, prompt in enumerate(prompts)]
    prompts[0], prompts[3] = (prompts[0] * 2)[:67], (prompts[0] * 2)[:70]
    params = [
        SamplingParams(max_tokens=28 + index, temperature=0.5 * (index % 2), top_k=4 * (index % 4), seed=index)
        for index in range(12)
    ]
    handles = [engine.submit(*each) for each in zip(prompts[:5], params, strict=False)]
    next(iter(handles[0]))  # the others arrive while these run
    handles += [engine.submit(*each) for each in zip(prompts[5:], params[5:], strict=True)]
    finished = [handle.result()[0] for handle in handles]
    expected = generate(lm, prompts, ISD(stride=4), params, batch_size=3, deterministic="bitwise")
    assert finished[1:] == [completion.token_ids for completion in expected[1:]]
    assert [handle.logit_checksums for handle in handles] == [completion.logit_checksums for completion in expected]
    assert 0.05 < np.mean([completion.acceptance_rate for completion in expected]) < 0.95
    assert engine.stats().num_preemptions > 0
    assert any(handle.request.num_cached_tokens == CONFIG.page_size for handle in handles)


def test_what_would_have_other_bits_is_refused(lm):
    with pytest.raises(ValueError, match="page_size=8 must be 64"):
        dataclasses.replace(CONFIG, page_size=8)
    with pytest.raises(ValueError, match="16 rows a request, and a window of this method has 17"):
        Device(lm, dataclasses.replace(CONFIG, method=ISD(stride=9)))
    with pytest.raises(ValueError, match=r"deterministic='bitwise' serves on one device, and the model .* on 2"):
        mesh = serving_mesh(2)
        assert mesh is not None
        params = jax.device_put(lm.params, jax.NamedSharding(mesh, PartitionSpec()))
        Device(dataclasses.replace(lm, params=params), CONFIG)


def test_programs_have_whole_groups(monkeypatch):
    """As on an accelerator, whose tiles hold several requests."""
    assert CONFIG.decode_buckets == (4,)
    monkeypatch.setattr("serve.config.group_slots_of", lambda deterministic: 8 if deterministic else None)
    config = EngineConfig(max_running=20, deterministic="bitwise")
    assert config.decode_buckets == (8, 16, 24)
    assert [config.whole_groups(requests) for requests in (1, 8, 9)] == [8, 8, 16]
    assert EngineConfig(max_running=20).decode_buckets == (1, 2, 4, 8, 16, 20)
