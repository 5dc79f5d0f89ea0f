"""The folder for the reference server in transformers, with which that server reads configuration and tokenizer."""

import numpy as np
import pytest
import torch
import transformers

from idlm_jax.weights import export_sglang
from tests.support.tiny_tokenizer import byte_tokenizer
from tests.weights.test_sglang import lm_of

pytestmark = pytest.mark.torch


def test_transformers_loads_the_folder_and_computes_the_same_logits(tmp_path):
    lm = lm_of(param_dtype="float32")
    export_sglang(lm, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert (config.to_dict()["block_size"], config.mask_token_id) == (7, 151_669)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 151_680, (2, 11), dtype=np.int32)
    with torch.no_grad():
        wanted = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    # Float32 on both sides, summed in another order, as in test_transformers.py.
    np.testing.assert_allclose(lm.logits(tokens), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(): <|MASK|>"
    assert tokenizer.encode(text) == byte_tokenizer().encode(text) and tokenizer.eos_token == "<|endoftext|>"
