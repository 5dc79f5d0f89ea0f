"""A weight in 8 bits with one scale per output column, and how it is made."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int, Int8

# What a weight is held in. "fp8" is float8_e4m3fn.
Form = Literal["int8", "fp8"]
VALUE_DTYPES: dict[Form, jnp.dtype] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}

INT8_MAX = 127.0
FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448; beyond it e4m3fn has NaN, not infinity


class QuantizedWeight(NamedTuple):
    """weight[d, f] = values[d, f] * scale[f], or the weights of several layers, one behind the other.

    Attributes:
        values: int8 in [-127, 127], or float8_e4m3fn, [D, F] or [L, D, F].
        scale: positive, [F] or [L, F].
    """

    values: Int8[Array, "*L D F"] | Float8e4m3fn[Array, "*L D F"]
    scale: Float32[Array, "*L F"]


def layer_of(stack: QuantizedWeight, layer: Int[Array, ""]) -> QuantizedWeight:
    """One weight of a stack; XLA may copy it."""
    return QuantizedWeight(*(jax.lax.dynamic_index_in_dim(part, layer, 0, keepdims=False) for part in stack))


def as_stack(weight: QuantizedWeight, layer: Int[Array, ""] | None) -> tuple[QuantizedWeight, Int[Array, ""]]:
    """A single weight as a stack of one; a stack as it is."""
    if layer is not None:
        return weight, layer
    return QuantizedWeight(*(part[None] for part in weight)), jnp.int32(0)


def quantize(weight: Float[Array, "D F"], form: Form) -> QuantizedWeight:
    """`quantize_int8` or `quantize_fp8`, by name."""
    return quantize_int8(weight) if form == "int8" else quantize_fp8(weight)


def quantize_int8(weight: Float[Array, "D F"]) -> QuantizedWeight:
    """Rounds to the nearest of 255 levels: scale[f] = max_d |weight[d, f]| / 127, symmetric, so 0 stays 0.

    The error of an element is at most half a level, scale[f] / 2.

    Args:
        weight: finite, any floating dtype.

    Returns:
        int8 values and float32 scales; a column of zeros gets scale 1.
    """
    levels, scale = _scaled(weight, INT8_MAX)
    return QuantizedWeight(jnp.clip(jnp.round(levels), -INT8_MAX, INT8_MAX).astype(jnp.int8), scale)


def quantize_fp8(weight: Float[Array, "D F"]) -> QuantizedWeight:
    """Rounds to float8_e4m3fn after scaling each column's largest element to 448, the largest finite value.

    Three bits of mantissa: the error of an element is at most 2^-4 of it, or 2^-10 scale[f] where it is subnormal.

    Args:
        weight: finite, any floating dtype.

    Returns:
        float8_e4m3fn values and float32 scales; a column of zeros gets scale 1.
    """
    levels, scale = _scaled(weight, FP8_MAX)
    return QuantizedWeight(jnp.clip(levels, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn), scale)


def _scaled(weight: Float[Array, "D F"], largest: float) -> tuple[Float32[Array, "D F"], Float32[Array, " F"]]:
    """The weight in units of its scale, within rounding of [-largest, largest]."""
    wide = weight.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(wide), axis=0, initial=0.0)
    scale = jnp.where(absmax > 0, absmax / largest, 1.0)
    return wide / scale[None, :], scale
