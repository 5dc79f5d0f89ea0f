"""A weight in 8 bits with one scale per output column, and how it is made."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int8

INT8_MAX = 127.0
FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448; beyond it e4m3fn has NaN, not infinity


class QuantizedWeight(NamedTuple):
    """weight[d, f] = values[d, f] * scale[f].

    Attributes:
        values: int8 in [-127, 127], or float8_e4m3fn, [D, F].
        scale: positive, [F].
    """

    values: Int8[Array, "D F"] | Float8e4m3fn[Array, "D F"]
    scale: Float32[Array, " F"]


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
