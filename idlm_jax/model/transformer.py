"""Qwen3 as one thin Flax NNX module: embedding, a scanned stack of blocks, final norm, head.

The module is split once, at the jit boundary (`nnx.split`), and merged inside. Block parameters carry a leading layer
axis, so one compiled body serves every layer and a checkpoint has one array per kind of tensor.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from idlm_jax.array_types import Hidden, Logits, Positions, RowGate, Tokens
from idlm_jax.config import ModelConfig
from idlm_jax.model.attention import Attend, Attention, RopeTables, causal_attend
from idlm_jax.model.layers import GatedMlp, LayerStack, RMSNorm, rope_tables, vocabulary_product
from idlm_jax.model.markov_head import MarkovHead
from pallas_kernels.two_stream_attention import SAVED

# Axis letters of every parameter, one entry per array; weight names and sharding rules are both derived from it.
# Weights in 8 bits: QUANTIZED_AXES.
PARAM_AXES: dict[tuple[str, ...], str] = {
    ("embedding",): "VD",
    ("blocks", "attention_norm", "weight"): "LD",
    ("blocks", "attention", "q", "kernel"): "LDNH",
    ("blocks", "attention", "k", "kernel"): "LDKH",
    ("blocks", "attention", "v", "kernel"): "LDKH",
    ("blocks", "attention", "o", "kernel"): "LNHD",
    ("blocks", "attention", "q_norm", "weight"): "LH",
    ("blocks", "attention", "k_norm", "weight"): "LH",
    ("blocks", "mlp_norm", "weight"): "LD",
    ("blocks", "mlp", "gate", "kernel"): "LDF",
    ("blocks", "mlp", "up", "kernel"): "LDF",
    ("blocks", "mlp", "down", "kernel"): "LFD",
    ("final_norm", "weight"): "D",
    ("head",): "VD",
}


def output_axes(axes: str) -> str:
    """Letters that a projection writes: linear maps read or write the model width, so DNH maps D to NH, NHD NH to D."""
    return axes[1:] if axes[0] == "D" else axes[-1]


# What stands in place of a kernel in a model with 8-bit weights: its values, and a scale per output column. Inputs and
# outputs are one axis each, which goes by its first letter: on TPU, merging axes of a stack would write it anew.
QUANTIZED_AXES: dict[tuple[str, ...], str] = {
    (*path[:-1], part): part_axes
    for path, axes in PARAM_AXES.items()
    if path[-1] == "kernel"
    for output in (output_axes(axes[1:])[0],)
    for part, part_axes in (("values", f"L{axes[1]}{output}"), ("scale", f"L{output}"))
}

# For programs that run the model without a gradient, on any platform; only XLA:GPU reads them. With its own defaults it
# copies every layer's weights out of their stacks before it multiplies by them (docs/decisions/0005): products of
# Triton's take no slice, and products of one input are merged by writing their weights side by side. cuBLAS is handed
# the address of the slice instead.
INFERENCE_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


class Block(nnx.Module):
    """Pre-norm decoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config)
        self.mlp = GatedMlp(config, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        rope: RopeTables,
        attend: Attend,
        layer: Int[Array, ""],
        carried: Any,
        lora_gate: RowGate | None,
    ) -> tuple[Hidden, Any]:
        mixed, carried = self.attention(self.attention_norm(x), rope, attend, layer, carried, lora_gate)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x), lora_gate, layer), carried


class Qwen3(nnx.Module):
    """The decoder. `config.lora` adds gated adapters; without a gate they have no effect.

    `config.markov_rank` adds a head that corrects drafts (`markov_head`), beside the model: no forward runs it.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draws fresh parameters: normal, 0.02 for embedding and head, 1/sqrt(fan-in) for projections."""

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.config = config
        normal = jax.nn.initializers.normal(0.02)
        table_shape, dtype = (config.vocab_size, config.hidden_size), jnp.dtype(config.param_dtype)
        self.embedding = nnx.Param(normal(rngs.params(), table_shape, dtype))
        self.blocks = stacked_blocks(rngs)
        self.final_norm = RMSNorm(config.hidden_size, config)
        if not config.tie_embeddings:
            self.head = nnx.Param(normal(rngs.params(), table_shape, dtype))
        if config.markov_rank is not None:
            self.markov = MarkovHead(config, rngs=rngs)

    def hidden_states(
        self,
        tokens: Tokens,
        positions: Positions,
        attend: Attend,
        *,
        carried: Any = None,
        lora_gate: RowGate | None = None,
    ) -> tuple[Hidden, Any]:
        """Runs the stack.

        Args:
            tokens: ids in [0, V).
            positions: rotary position of every row.
            attend: who sees whom.
            carried: pytree that `attend` takes and hands on from layer to layer (a KV cache); None for none.
            lora_gate: rows on which the adapter acts; None leaves it out altogether.

        Returns:
            The normed hidden states, and `carried` as the last layer left it.
        """
        config = self.config
        rope = rope_tables(positions, config.head_dim, config.rope_theta)
        graph, whole, sliced = nnx.split(self.blocks, LayerStack, ...)

        def layer(
            state: tuple[Hidden, Any], inputs: tuple[nnx.State, Int[Array, ""]]
        ) -> tuple[tuple[Hidden, Any], None]:
            params, number = inputs
            x, carried = state
            return nnx.merge(graph, params, whole)(x, rope, attend, number, carried, lora_gate), None

        if config.remat != "none":
            policies = jax.checkpoint_policies
            # Attention is a product with batch dimensions: kept as well, or its forward kernel would run twice.
            dots = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
            )
            keep = dots if config.remat == "dots" else None
            layer = jax.checkpoint(layer, policy=keep)
        x = self.embedding[...][tokens].astype(config.compute)
        numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
        (x, carried), _ = jax.lax.scan(layer, (x, carried), (sliced, numbers), unroll=config.scan_unroll)
        return self.final_norm(x), carried

    def head_weight(self) -> Float[Array, "V D"]:
        """Rows of the output head in compute dtype; the embedding itself when tied."""
        weight = self.embedding if self.config.tie_embeddings else self.head
        return weight[...].astype(self.config.compute)

    def logits(self, hidden: Hidden) -> Logits:
        """Float32 scores of the next token for every given row."""
        return vocabulary_product(hidden, self.head_weight())

    def markov_features(self, hidden: Hidden, before: Tokens) -> Float[Array, "B T R"]:
        """`MarkovHead.features` of MASK rows, given the tokens just before those that they predict.

        The embedding is read and not trained by it.
        """
        embedded = jax.lax.stop_gradient(self.embedding[...])[before].astype(self.config.compute)
        return self.markov.features(hidden, embedded)

    def __call__(self, tokens: Tokens) -> Logits:
        """Causal logits of whole sequences that start at position 0."""
        batch, rows = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (batch, rows))
        visible = jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool)), (batch, rows, rows))
        hidden, _ = self.hidden_states(tokens, positions, causal_attend(visible))
        return self.logits(hidden)
