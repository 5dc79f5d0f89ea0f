"""Random models small enough for a test."""

import dataclasses
from typing import Any

from flax import nnx

from idlm_jax.config import ModelConfig
from idlm_jax.model.language_model import LanguageModel, from_module
from idlm_jax.model.transformer import Qwen3

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_size=48,
    max_position=512,
    mask_token_id=96,
)


def tiny_config(**changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def tiny_module(seed: int = 0, **changes: Any) -> Qwen3:
    return Qwen3(tiny_config(**changes), rngs=nnx.Rngs(seed))


def tiny_lm(seed: int = 0, **changes: Any) -> LanguageModel:
    return from_module(tiny_module(seed, **changes))
