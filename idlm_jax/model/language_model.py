"""A model ready to use: configuration, parameters and tokenizer, with the module already split for jit."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from idlm_jax.config import ModelConfig
from idlm_jax.model.transformer import Qwen3


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """What `load` returns and `generate` and `export_hf` take.

    Attributes:
        graph: static half of the split module; hashable, a jit-static argument.
        params: the arrays, base parameters and adapter alike.
        tokenizer: Hugging Face tokenizer, or None for a folder without one: token-id prompts still work.
        hf_config: the `config.json` the model came from, kept so that an export changes nothing it need not.
    """

    graph: nnx.GraphDef[Qwen3]
    params: nnx.State
    tokenizer: PreTrainedTokenizerBase | None = None
    hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def module(self) -> Qwen3:
        return nnx.merge(self.graph, self.params)

    @property
    def config(self) -> ModelConfig:
        return self.module.config

    def logits(self, token_ids: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Causal logits, float32; the adapter, which acts on MASK rows only, is left out.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        ids = np.asarray(token_ids, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} exceed the vocabulary of {self.config.vocab_size}")
        return _logits(self.graph, self.params, jnp.asarray(ids))


def from_module(
    module: Qwen3,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    hf_config: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Splits `module`; later changes to it do not reach the result."""
    graph, params = nnx.split(module)
    return LanguageModel(graph, params, tokenizer, dict(hf_config or {}))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef[Qwen3], params: nnx.State, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return nnx.merge(graph, params)(tokens)
