"""A server of 8-bit weights returns what `generate` returns with them."""

import dataclasses

from idlm_jax.config import LoraConfig
from idlm_jax.decoding import AR, SamplingParams, generate
from idlm_jax.model.language_model import from_module
from idlm_jax.weights import export_adapter, export_hf, load
from serve.engine import Engine
from tests.serve.conftest import CONFIG
from tests.support.tiny_model import random_prompts, randomize_adapter, sharpen, tiny_module


def test_greedy_requests_to_8_bit_weights_equal_ar_with_them(tmp_path):
    module = tiny_module(3, vocab_size=12, mask_token_id=11, lora=LoraConfig(rank=3, alpha=6.0))
    whole = from_module(randomize_adapter(sharpen(module, 4.0)))
    export_hf(whole, tmp_path / "hf")
    export_adapter(whole, tmp_path / "adapter", base_model_name_or_path="hf")
    lm = load(tmp_path / "hf", dtype="float32", quantize="int8", adapter=tmp_path / "adapter")
    prompts, greedy = random_prompts(4, 14, 11), SamplingParams(max_tokens=16)
    config = dataclasses.replace(CONFIG, decode_batches=(4,), prefill_shapes=((1, 16),), shapes=False)
    engine = Engine(lm, config)
    handles = [engine.submit(prompt, greedy) for prompt in prompts]
    results = [handle.result()[0] for handle in handles]
    engine.close(drain=True)
    assert results == [each.token_ids for each in generate(lm, prompts, AR(), greedy)]
