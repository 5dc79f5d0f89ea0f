"""I-DLM in JAX: convert Qwen3, train for introspective consistency, decode exactly, export."""

from idlm_jax.decoding import (
    AR,
    ISD,
    BlockDiffusion,
    Completion,
    SamplingParams,
    TokenLogprob,
    TwoPass,
    generate,
    generate_stream,
    stream_tokens,
    trace,
)
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights import export_adapter, export_hf, load

__version__ = "0.1.0"

__all__ = [
    "AR",
    "ISD",
    "BlockDiffusion",
    "Completion",
    "LanguageModel",
    "SamplingParams",
    "TokenLogprob",
    "TwoPass",
    "export_adapter",
    "export_hf",
    "generate",
    "generate_stream",
    "load",
    "stream_tokens",
    "trace",
]
