"""Shapes of released models, for tests that build no array."""

import dataclasses

from idlm_jax.qwen3_sizes import QWEN3_SIZES

QWEN3_8B = dataclasses.replace(QWEN3_SIZES["Qwen3-8B"], param_dtype="bfloat16", compute_dtype="bfloat16")
