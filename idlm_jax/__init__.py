"""I-DLM in JAX: convert Qwen3, train for introspective consistency, decode exactly, export."""

from idlm_jax.decoding import (
    AR,
    ISD,
    BlockDiffusion,
    Completion,
    Consistency,
    Estimate,
    SamplingParams,
    TokenLogprob,
    TwoPass,
    generate,
    generate_stream,
    measure,
    stream_tokens,
    trace,
)
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights import export_adapter, export_hf, export_sglang, load

__version__ = "0.1.0"

__all__ = [
    "AR",
    "ISD",
    "BlockDiffusion",
    "Completion",
    "Consistency",
    "Estimate",
    "LanguageModel",
    "SamplingParams",
    "TokenLogprob",
    "TwoPass",
    "export_adapter",
    "export_hf",
    "export_sglang",
    "generate",
    "generate_stream",
    "load",
    "measure",
    "stream_tokens",
    "trace",
]
