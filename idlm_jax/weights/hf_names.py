"""The one table between Hugging Face tensors and our parameters; loading and exporting both read it.

Hugging Face keeps a linear map as [out, in] with heads flattened; we keep [*in, *out] with heads as axes and
blocks stacked over layers. Rotary pairs are laid out alike, so no row is permuted.
"""

import dataclasses
import math

from jaxtyping import Array, Float

from idlm_jax.config import ModelConfig
from idlm_jax.model.transformer import PARAM_AXES, output_axes

# Parameter path -> Hugging Face module; every tensor is the ".weight" of its module.
HF_MODULES: dict[tuple[str, ...], str] = {
    ("embedding",): "model.embed_tokens",
    ("blocks", "attention_norm", "weight"): "model.layers.{layer}.input_layernorm",
    ("blocks", "attention", "q", "kernel"): "model.layers.{layer}.self_attn.q_proj",
    ("blocks", "attention", "k", "kernel"): "model.layers.{layer}.self_attn.k_proj",
    ("blocks", "attention", "v", "kernel"): "model.layers.{layer}.self_attn.v_proj",
    ("blocks", "attention", "o", "kernel"): "model.layers.{layer}.self_attn.o_proj",
    ("blocks", "attention", "q_norm", "weight"): "model.layers.{layer}.self_attn.q_norm",
    ("blocks", "attention", "k_norm", "weight"): "model.layers.{layer}.self_attn.k_norm",
    ("blocks", "mlp_norm", "weight"): "model.layers.{layer}.post_attention_layernorm",
    ("blocks", "mlp", "gate", "kernel"): "model.layers.{layer}.mlp.gate_proj",
    ("blocks", "mlp", "up", "kernel"): "model.layers.{layer}.mlp.up_proj",
    ("blocks", "mlp", "down", "kernel"): "model.layers.{layer}.mlp.down_proj",
    ("final_norm", "weight"): "model.norm",
    ("head",): "lm_head",
}

# A tied checkpoint may store its head a second time under this name.
TIED_ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}

# PEFT names the modules as it sees them from its own two wrappers.
PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One Hugging Face tensor and where it lives in our parameters.

    Attributes:
        name: Hugging Face name.
        path: our parameter.
        layer: index into the parameter's leading layer axis; None when it has none.
        axes: letters of our slice, layer axis left out; a flattened axis goes by its leading letter.
        shape: sizes of those axes.
        num_inputs: how many leading axes are inputs of a linear map; 0 when both sides share one layout.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    axes: str
    shape: tuple[int, ...]
    num_inputs: int

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if not self.num_inputs:
            return self.shape
        return math.prod(self.shape[self.num_inputs :]), math.prod(self.shape[: self.num_inputs])

    @property
    def hf_axes(self) -> str:
        """Letters that stand first in each Hugging Face axis: those that sharding may cut."""
        return self.axes[self.num_inputs] + self.axes[0] if self.num_inputs else self.axes

    def from_hf(self, tensor: Float[Array, "..."]) -> Float[Array, "..."]:
        """[out, in] -> [*in, *out], or the tensor itself where the layouts agree."""
        return (tensor.T if self.num_inputs else tensor).reshape(self.shape)

    def to_hf(self, array: Float[Array, "..."]) -> Float[Array, "..."]:
        """Inverse of `from_hf`."""
        return array.reshape(self.hf_shape[::-1]).T if self.num_inputs else array


def base_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor of the base model, in the order of the forward pass; no head when it is tied."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_size,
    }

    def spec(path: tuple[str, ...], layer: int | None) -> TensorSpec:
        axes = PARAM_AXES[path].removeprefix("L")
        is_linear = path[-1] == "kernel"
        return TensorSpec(
            name=HF_MODULES[path].format(layer=layer) + ".weight",
            path=path,
            layer=layer,
            axes=axes,
            shape=tuple(sizes[letter] for letter in axes),
            num_inputs=len(axes) - len(output_axes(axes)) if is_linear else 0,
        )

    in_blocks = [path for path in HF_MODULES if path[0] == "blocks"]
    return (
        spec(("embedding",), None),
        *(spec(path, layer) for layer in range(config.num_layers) for path in in_blocks),
        spec(("final_norm", "weight"), None),
        *(() if config.tie_embeddings else (spec(("head",), None),)),
    )


def adapter_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Both PEFT factors of every linear map in every layer: A as (r, in), B as (out, r).

    Raises:
        ValueError: `config.lora` is None.
    """
    if config.lora is None:
        raise ValueError(f"{config.lora=}: this model has no adapter")
    specs = []
    for base in base_tensors(config):
        if not base.num_inputs:
            continue
        (num_out, num_in), (out_letter, in_letter) = base.hf_shape, base.hf_axes
        factors = (
            ("lora_a", "lora_A", in_letter + "R", (num_in, config.lora.rank)),
            ("lora_b", "lora_B", "R" + out_letter, (config.lora.rank, num_out)),
        )
        specs += [
            TensorSpec(
                name=f"{PEFT_PREFIX}{base.name.removesuffix('.weight')}.{theirs}.weight",
                path=(*base.path[:-1], ours),
                layer=base.layer,
                axes=axes,
                shape=shape,
                num_inputs=1,
            )
            for ours, theirs, axes, shape in factors
        ]
    return tuple(specs)


def adapted_modules() -> tuple[str, ...]:
    """Last names of the seven adapted modules, as PEFT's `target_modules` lists them."""
    return tuple(name.rsplit(".", 1)[-1] for path, name in HF_MODULES.items() if path[-1] == "kernel")
