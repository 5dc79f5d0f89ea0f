"""Exact decoding: AR, introspective strided decoding, and the loop that runs either."""

from idlm_jax.decoding.generate import Completion, TokenLogprob, generate
from idlm_jax.decoding.method import AR, ISD
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.stream import generate_stream, stream_tokens

__all__ = [
    "AR",
    "ISD",
    "Completion",
    "SamplingParams",
    "TokenLogprob",
    "generate",
    "generate_stream",
    "stream_tokens",
]
