"""The Markov head: what the draft just before a MASK row tells about the row's own token.

All MASK rows of a group are computed at once, so none of them sees what the others draft: at a MASK that is as good as
certain to read "(self" or "import numpy", the second half may still be spread over what could follow any first half.
The head corrects the logits of a row once the draft before it is known, from that draft and the row's hidden state:

    logits + columns silu([hidden | embedding of the draft before] mix) shrink

Drafts are therefore drawn one after the other, each from a product of width R instead of D with the vocabulary (6 % of
the output head for R = 256 on Qwen3-8B). Verification takes q as it was drawn from, so it stays exact; rows of verified
tokens are not touched.

Source: the Markov head of DSpark (arXiv 2607.05147) and the sampler head of Apple's multi-token prediction (arXiv
2507.11851). differs: low rank as the first, and it looks at the row's hidden state as the second.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from idlm_jax.array_types import Hidden, Logits
from idlm_jax.config import ModelConfig
from idlm_jax.model.layers import vocabulary_product

# As `PARAM_AXES` of the model. C: hidden state and embedding side by side; M: inner width; both are small and whole.
MARKOV_AXES: dict[tuple[str, ...], str] = {
    ("markov", "mix"): "CM",
    ("markov", "shrink"): "MR",
    ("markov", "columns"): "VR",
}


def markov_shapes(config: ModelConfig, rank: int) -> dict[tuple[str, ...], tuple[int, int]]:
    """The shape of every parameter of a head of this rank."""
    inner = 2 * rank
    shapes = (2 * config.hidden_size, inner), (inner, rank), (config.vocab_size, rank)
    return dict(zip(MARKOV_AXES, shapes, strict=True))


class MarkovHead(nnx.Module):
    """A correction of rank `config.markov_rank`; a new one changes nothing, for its columns are zero."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.markov_rank is not None  # or there is no head
        mix, shrink, columns = markov_shapes(config, config.markov_rank).values()
        dtype = jnp.dtype(config.param_dtype)

        def normal(shape: tuple[int, int]) -> Array:
            return jax.nn.initializers.normal(shape[0] ** -0.5)(rngs.params(), shape, dtype)

        # LoRAParam: like an adapter's factors, these are trained where the base is frozen.
        self.mix = nnx.LoRAParam(normal(mix))
        self.shrink = nnx.LoRAParam(normal(shrink))
        self.columns = nnx.LoRAParam(jnp.zeros(columns, dtype))
        self.eps, self.compute_dtype = config.norm_eps, config.compute_dtype

    def features(self, hidden: Hidden, before: Hidden) -> Float[Array, "B T R"]:
        """What `columns` turns into logits.

        Args:
            hidden: final hidden states of MASK rows.
            before: embeddings of the tokens that stand just before the ones that the rows predict.
        """
        both = jnp.concatenate([self._normed(hidden), self._normed(before)], axis=-1)
        dtype = both.dtype
        return jax.nn.silu(both @ self.mix[...].astype(dtype)) @ self.shrink[...].astype(dtype)

    def weight(self) -> Float[Array, "V R"]:
        """`columns` in compute dtype."""
        return self.columns[...].astype(self.compute_dtype)

    def logits(self, features: Float[Array, "B T R"]) -> Logits:
        """What is added to the rows' logits; float32."""
        return vocabulary_product(features, self.weight())

    def _normed(self, x: Hidden) -> Hidden:
        # Embeddings and hidden states differ by orders of magnitude, and from model to model.
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(self.compute_dtype)
