"""Random models small enough for a test."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    """Random parameters drawn by numpy: tracing the real initialisers would compile a program for each of them."""
    module = nnx.eval_shape(lambda: Qwen3(tiny_config(**changes), rngs=nnx.Rngs(0)))

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-2].key if isinstance(path[-1], jax.tree_util.GetAttrKey) else path[-1].key
        if name == "weight":  # norms
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "lora_b":  # a fresh adapter changes nothing
            return jnp.zeros(leaf.shape, leaf.dtype)
        # Keyed by name, so that the base is the same with and without an adapter.
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        scale = 0.02 if name in ("embedding", "head") else float(np.prod(leaf.shape[1:-1])) ** -0.5
        return jnp.asarray(rng.normal(scale=scale, size=leaf.shape), leaf.dtype)

    graph, abstract = nnx.split(module)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, abstract))


def tiny_lm(seed: int = 0, **changes: Any) -> LanguageModel:
    return from_module(tiny_module(seed, **changes))


def sharpen(module: Qwen3, factor: float) -> Qwen3:
    """Scales embedding and head: fresh weights give almost uniform logits, on which few mistakes would show."""
    module.embedding[...] = module.embedding[...] * factor
    if not module.config.tie_embeddings:
        module.head[...] = module.head[...] * factor
    return module


def randomize_adapter(module: Qwen3, seed: int = 1, scale: float = 0.3) -> Qwen3:
    """Gives every second LoRA factor random values; a fresh adapter is zero there and would hide a leak."""
    state = nnx.state(module, nnx.LoRAParam)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [scale * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    nnx.update(module, jax.tree.unflatten(tree, drawn))
    return module


def random_prompts(num: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to `longest` ids in [0, vocab_size)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=rng.integers(1, longest + 1)).tolist() for _ in range(num)]
