"""Exact decoding: AR, introspective strided decoding, what it is compared with, and the loop that runs them."""

from idlm_jax.decoding.bootstrap import Estimate
from idlm_jax.decoding.generate import Completion, TokenLogprob, generate
from idlm_jax.decoding.measure import Consistency, measure
from idlm_jax.decoding.method import AR, ISD, BlockDiffusion, TwoPass
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.stream import generate_stream, stream_tokens
from idlm_jax.decoding.trace import trace

__all__ = [
    "AR",
    "ISD",
    "BlockDiffusion",
    "Completion",
    "Consistency",
    "Estimate",
    "SamplingParams",
    "TokenLogprob",
    "TwoPass",
    "generate",
    "generate_stream",
    "measure",
    "stream_tokens",
    "trace",
]
