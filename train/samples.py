"""Completions of fixed held-out prompts during a run: what the numbers of an evaluation look like as text."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from idlm_jax.decoding import SamplingParams, generate
from idlm_jax.decoding.method import Method
from idlm_jax.model.language_model import LanguageModel
from pallas_kernels.bodies import REFERENCE

PROMPT_TOKENS, MAX_TOKENS = 32, 48


class Sample(NamedTuple):
    """A prompt and its greedy completion; `tokens_per_forward` counts the prompt's forward."""

    prompt: str
    text: str
    tokens_per_forward: float


def format_sample(sample: Sample) -> str:
    """One line: the end of the prompt, what follows, and its tokens per forward."""
    return f"sample · {sample.tokens_per_forward:.2f} TPF · ...{sample.prompt[-40:]!r} -> {sample.text[:80]!r}"


def draw_samples(lm: LanguageModel, prompts: list[list[int]], method: Method, mesh: Mesh | None) -> Iterator[Sample]:
    """Completes every prompt at temperature 0.

    Args:
        lm: the model, with its tokenizer; sharded over `mesh`.
        prompts: token ids.
        method: how.
        mesh: of the arrays; None for one device.
    """
    tokenizer = lm.tokenizer
    assert tokenizer is not None  # a run's model has that of its dataset
    if mesh is not None:
        # Kernels would have to be told how their arrays are cut; plain XLA partitions itself.
        lm = dataclasses.replace(lm, graph=_with_reference_kernels(lm))
    room = lm.config.max_position - max(map(len, prompts))
    params = SamplingParams(max_tokens=min(MAX_TOKENS, room), temperature=0.0, ignore_eos=True)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        completions = generate(lm, prompts, method, params, batch_size=len(prompts))
    for prompt, completion in zip(prompts, completions, strict=True):
        text = tokenizer.decode(prompt)
        assert isinstance(text, str)
        yield Sample(text, completion.text, completion.tokens_per_forward)


def _with_reference_kernels(lm: LanguageModel) -> nnx.GraphDef:
    module = nnx.merge(lm.graph, lm.params)
    module.config = dataclasses.replace(module.config, kernels=REFERENCE)
    return nnx.split(module)[0]
