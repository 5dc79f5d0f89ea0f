"""The pieces of a Qwen3 block that know nothing of attention: RMSNorm, RoPE, projections, gated MLP."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from idlm_jax.array_types import Hidden, RowGate
from idlm_jax.config import ModelConfig
from pallas_kernels.gated_lora import gated_update
from pallas_kernels.quantized_matmul import VALUE_DTYPES, QuantizedWeight, quantized_matmul


class RMSNorm(nnx.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the mean in float32 over the last axis."""

    def __init__(self, size: int, config: ModelConfig):
        self.weight = nnx.Param(jnp.ones((size,), config.param_dtype))
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        weight = jnp.broadcast_to(self.weight[...].astype(x.dtype), x.shape)
        return weight * normed.astype(x.dtype)


class Projection(nnx.Module):
    """y = einsum(x, kernel), with an optional low-rank update on gated rows (`pallas_kernels.gated_lora`).

    A row whose gate is off has the base model's output bit for bit. Both factors are 2-D, as PEFT stores them.
    """

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], config: ModelConfig, *, rngs: nnx.Rngs):
        """Kernel of shape [*in_shape, *out_shape], drawn from a normal of variance 1 / fan-in."""
        self.in_shape, self.out_shape, self.compute_dtype = in_shape, out_shape, config.compute_dtype
        fan_in = math.prod(in_shape)
        self._init_weight(config, rngs)
        self.lora_scale = config.lora.scale if config.lora else 0.0
        if config.lora:
            # A as in PEFT (Kaiming uniform with a = sqrt(5)), B zero: a new adapter changes nothing.
            bound = fan_in**-0.5
            self.lora_a = nnx.LoRAParam(
                jax.random.uniform(
                    rngs.params(),
                    (fan_in, config.lora.rank),
                    jnp.dtype(config.param_dtype),
                    -bound,
                    bound,
                )
            )
            self.lora_b = nnx.LoRAParam(jnp.zeros((config.lora.rank, math.prod(out_shape)), config.param_dtype))

    def __call__(
        self, x: Float[Array, "B T ..."], gate: RowGate | None, layer: Int[Array, ""]
    ) -> Float[Array, "B T ..."]:
        batch, rows = x.shape[:2]
        dtype = self.compute_dtype
        # One axis of rows: on a CPU a row's product then has the same bits in windows of every width tried. Over a mesh
        # the two axes stay, for both may be cut, and one axis of all rows could not be.
        mesh = jax.sharding.get_abstract_mesh()
        row_shape = (batch, rows) if not mesh.empty and mesh.size > 1 else (batch * rows,)
        flat = x.astype(dtype).reshape(*row_shape, -1)
        y = _of_two_rows(lambda flat: self._base_product(flat, layer), flat)
        if self.lora_scale and gate is not None:
            lora_a, lora_b = self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)
            y = y + gated_update(flat, lora_a, lora_b, gate.reshape(row_shape), self.lora_scale)
        return y.reshape(batch, rows, *self.out_shape)

    def _init_weight(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        normal = jax.nn.initializers.normal(math.prod(self.in_shape) ** -0.5)
        shape = (*self.in_shape, *self.out_shape)
        self.kernel = nnx.Param(normal(rngs.params(), shape, jnp.dtype(config.param_dtype)))

    def _base_product(self, flat: Float[Array, "*M D"], layer: Int[Array, ""]) -> Float[Array, "*M F"]:
        del layer  # the scan over layers has sliced the kernel
        return flat @ self.kernel[...].astype(flat.dtype).reshape(flat.shape[-1], -1)


class LayerStack(nnx.Param):
    """A parameter that the scan over layers hands to every layer whole, with the layer's number.

    A kernel reads its layer's part where it lies; of a slice, XLA would make a copy first (docs/decisions/0005).
    """


class QuantizedProjection(Projection):
    """A `Projection` whose weight is held in 8 bits with one scale per output column; for inference.

    It works inside the scan over layers only, where its two parameters are those of all layers.

    The adapter's factors stay in the parameter dtype, and its update is added to the product of the 8-bit weight: a row
    whose gate is off has the bits of the quantised base model.
    """

    def _init_weight(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Zeros: an 8-bit weight is made from another (`pallas_kernels.quantized_matmul.quantize`), never drawn."""
        assert config.quantize is not None
        width, columns = math.prod(self.in_shape), math.prod(self.out_shape)
        self.values = LayerStack(jnp.zeros((width, columns), VALUE_DTYPES[config.quantize]))
        self.scale = LayerStack(jnp.ones(columns, jnp.float32))
        self.body, self.interpret = config.kernels.quantized_matmul, config.kernels.interpret

    def _base_product(self, flat: Float[Array, "*M D"], layer: Int[Array, ""]) -> Float[Array, "*M F"]:
        rows, weight = flat.reshape(-1, flat.shape[-1]), QuantizedWeight(self.values[...], self.scale[...])
        y = quantized_matmul(rows, weight, layer, body=self.body, interpret=self.interpret)
        return y.reshape(*flat.shape[:-1], -1)


def make_projection(
    in_shape: tuple[int, ...], out_shape: tuple[int, ...], config: ModelConfig, *, rngs: nnx.Rngs
) -> Projection:
    """The kind that the config asks for."""
    kind = Projection if config.quantize is None else QuantizedProjection
    return kind(in_shape, out_shape, config, rngs=rngs)


class GatedMlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, inner = (config.hidden_size,), (config.mlp_size,)
        self.gate = make_projection(width, inner, config, rngs=rngs)
        self.up = make_projection(width, inner, config, rngs=rngs)
        self.down = make_projection(inner, width, config, rngs=rngs)

    def __call__(self, x: Hidden, lora_gate: RowGate | None, layer: Int[Array, ""]) -> Hidden:
        inner = jax.nn.silu(self.gate(x, lora_gate, layer)) * self.up(x, lora_gate, layer)
        return self.down(inner, lora_gate, layer)


def vocabulary_product(x: Float[Array, "B T C"], weight: Float[Array, "V C"]) -> Float[Array, "B T V"]:
    """Float32 scores of every id for every row."""
    product = functools.partial(jnp.einsum, "BTC,VC->BTV", preferred_element_type=jnp.float32)
    return _of_two_rows(lambda x: product(x, weight), x)


def _of_two_rows(product: Callable[[Array], Array], x: Float[Array, "*M C"]) -> Float[Array, "*M F"]:
    """`product(x)`, a matrix product, of which XLA:GPU never sees a single row.

    That it would make a product with a vector, for which it writes weights anew: in every step of AR at batch 1 on
    Qwen3-8B the head in float32 (2.5 GB) and the keys' and values' kernels transposed (0.6 GB).
    """
    if math.prod(x.shape[:-1]) != 1:
        return product(x)

    def doubled(x: Float[Array, "*M C"]) -> Float[Array, "*M F"]:
        return product(jnp.concatenate([x, x], axis=-2))[..., :1, :]

    return jax.lax.platform_dependent(x, cuda=doubled, default=product)


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of the rotary angles, always float32: bfloat16 would turn position 257 into 256."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) * (1.0 / theta**exponents)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T X H"], tables: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
) -> Float[Array, "B T X H"]:
    """Rotates the pairs (i, i + H/2) of every head: Hugging Face's half-split layout, not the interleaved one."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
