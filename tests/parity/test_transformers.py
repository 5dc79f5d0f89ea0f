"""Our logits, names and exports against the torch implementation in transformers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from idlm_jax.weights import export_hf, load
from tests.support.tiny_model import tiny_lm
from tests.weights.folders import tensors_of

pytestmark = pytest.mark.torch

LAYOUTS = {
    "grouped": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "wide-heads": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "multi-head": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=8),
    "multi-query": dict(num_attention_heads=6, num_key_value_heads=1, head_dim=10),
}


def torch_model(folder, *, tie_word_embeddings=False, dtype=torch.float32, shard="5GB", **layout):
    """A random Qwen3 with norm weights away from 1, saved to `folder`."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        **layout,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A fresh model is nearly linear in its input and has unit norms: both would hide mistakes.
            parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def token_ids(batch=2, rows=23):
    return np.random.default_rng(0).integers(0, 97, (batch, rows), dtype=np.int32)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(tmp_path, layout, is_tied):
    model = torch_model(tmp_path, tie_word_embeddings=is_tied, **LAYOUTS[layout])
    lm = load(tmp_path, dtype="float32")
    with torch.no_grad():
        wanted = model(torch.tensor(token_ids(), dtype=torch.long)).logits.numpy()
    # Both sides sum in float32 but in another order: about 1e-6 of the largest logit; 1e-4 leaves room.
    np.testing.assert_allclose(lm.logits(token_ids()), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_round_trip_keeps_every_byte(tmp_path, dtype, shard):
    torch_model(tmp_path / "hf", dtype=getattr(torch, dtype), shard=shard, **LAYOUTS["wide-heads"])
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard == "20KB")
    export_hf(load(tmp_path / "hf", dtype=dtype), tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    theirs, ours = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), name
        assert tensor.tobytes() == ours[name].tobytes(), name


@pytest.mark.parametrize("is_tied", [False, True])
def test_transformers_loads_an_export_and_generates_the_same_tokens(tmp_path, is_tied):
    lm = tiny_lm(seed=3, tie_embeddings=is_tied, rope_theta=50_000.0)
    export_hf(lm, tmp_path / "ours", max_shard_bytes=30_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert isinstance(model, transformers.Qwen3ForCausalLM) and model.dtype == torch.float32
    prompt, steps = token_ids(2, 7), 24
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor(prompt, dtype=torch.long),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=steps,
            pad_token_id=0,
        )
    # One padded buffer, so that the loop compiles once: rows past the end cannot be seen by a causal model.
    tokens = np.pad(prompt, ((0, 0), (0, steps)))
    for end in range(prompt.shape[1], tokens.shape[1]):
        tokens[:, end] = np.asarray(lm.logits(tokens))[:, end - 1].argmax(-1)
    assert tokens.tolist() == wanted.tolist()


def test_rope_base_survives_an_export_of_a_transformers_5_folder(tmp_path):
    torch_model(tmp_path / "hf", **LAYOUTS["grouped"])
    export_hf(load(tmp_path / "hf", dtype="float32"), tmp_path / "ours")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.rope_parameters["rope_theta"] == 50_000.0
    # transformers 4 and SGLang read the flat field.
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["rope_theta"] == 50_000.0


def test_an_sdar_named_folder_is_plain_causal_qwen3(tmp_path):
    model = torch_model(tmp_path / "sdar", **LAYOUTS["grouped"])
    file = tmp_path / "sdar" / "config.json"
    named = {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "mask_token_id": 95,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    lm = load(tmp_path / "sdar", dtype="float32")
    assert lm.config.mask_token_id == 95
    with torch.no_grad():
        wanted = model(torch.tensor(token_ids(), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(lm.logits(token_ids()), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    export_hf(lm, tmp_path / "ours")
    # Without remote code and without SDAR's class: what is exported attends causally everywhere.
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(reloaded, transformers.Qwen3ForCausalLM)
    assert reloaded.config.mask_token_id == 95


def test_bfloat16_logits_stay_within_rounding_of_float32(tmp_path):
    torch_model(tmp_path, dtype=torch.bfloat16, **LAYOUTS["grouped"])
    exact, rounded = (load(tmp_path, dtype=dtype).logits(token_ids()) for dtype in ("float32", "bfloat16"))
    assert exact.dtype == rounded.dtype == jax.numpy.float32
    # Same bfloat16 weights; activations keep 8 bits, and three layers of them lose a few percent.
    assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
