"""Shapes of released models, for tests that build no array."""

from idlm_jax.config import ModelConfig

QWEN3_8B = ModelConfig(
    vocab_size=151_936,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_size=12_288,
    mask_token_id=151_669,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
)
