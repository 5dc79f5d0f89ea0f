"""Product with a weight held in 8 bits, scaled per output column: the contract of the op."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import Body, refuse
from pallas_kernels.quantized_matmul import reference, tpu, triton
from pallas_kernels.quantized_matmul.tiles import TpuTiles, TritonTiles
from pallas_kernels.quantized_matmul.weights import (
    VALUE_DTYPES,
    Form,
    QuantizedWeight,
    quantize,
    quantize_fp8,
    quantize_int8,
)

__all__ = [
    "VALUE_DTYPES",
    "Form",
    "QuantizedWeight",
    "TpuTiles",
    "TritonTiles",
    "quantize",
    "quantize_fp8",
    "quantize_int8",
    "quantized_matmul",
]

BODIES = (Body.REFERENCE, Body.TRITON, Body.TPU)
INPUT_DTYPES = (jnp.bfloat16, jnp.float32)


def quantized_matmul(
    x: Float[Array, "M D"],
    weight: QuantizedWeight,
    layer: Int[Array, ""] | None = None,
    *,
    body: Body = Body.REFERENCE,
    interpret: bool = False,
    tiles: TritonTiles | TpuTiles | None = None,
) -> Float[Array, "M F"]:
    """Multiplies rows by a quantised weight, for the few rows of a decode step.

    out[m, f] = scale[f] * sum_d x[m, d] * values[d, f]

    Values are converted to x's dtype, which holds each of them exactly; products and sums are float32, the scale is
    applied to the finished sum, and the result is rounded once. A float32 x is multiplied in float32, not in TF32.

    The Pallas bodies sum in an order that D, F and `tiles` fix and M does not: a row's bits are the same in any batch.
    XLA promises no such thing for the reference.

    Args:
        x: rows, bfloat16 or float32; M may be 0.
        weight: from `quantize_int8` or `quantize_fp8`; or a stack of them, [L, D, F] and [L, F], of which a kernel
            reads the one asked for where it lies. XLA would copy it out of the stack first.
        layer: which one of a stack, in [0, L); None for a single weight.
        body: which implementation runs.
        interpret: run a Pallas body in its interpreter; for tests.
        tiles: tile sizes of the chosen Pallas body; measured or default ones when None.

    Returns:
        The products, in x's dtype.

    Raises:
        ValueError: shapes disagree, or `tiles` belongs to another body.
        TypeError: a dtype is none of those named above, or the scale is not float32.
        NotImplementedError: the op has no such body.

    For inference: the Pallas bodies have no gradient.
    """
    values, scale = weight
    stack = () if layer is None else values.shape[:1]
    if x.ndim != 2 or values.shape[:-1] != (*stack, x.shape[1]):
        wanted = "[D, F]" if layer is None else "[L, D, F], for a layer is given,"
        raise ValueError(f"{values.shape=}, but {x.shape=} needs {wanted} with the D of [M, D]")
    if scale.shape != (*stack, values.shape[-1]):
        raise ValueError(f"{scale.shape=}, but {values.shape=} needs {(*stack, values.shape[-1])}")
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"{x.dtype=} is neither bfloat16 nor float32")
    if values.dtype not in VALUE_DTYPES.values():
        raise TypeError(f"{values.dtype=} is neither int8 nor float8_e4m3fn")
    if scale.dtype != jnp.float32:
        raise TypeError(f"{scale.dtype=} must be float32")
    expected = {Body.TRITON: TritonTiles, Body.TPU: TpuTiles}.get(body)
    if tiles is not None and (expected is None or not isinstance(tiles, expected)):
        raise ValueError(f"{tiles=} is not for the {body.value} body")
    match body:
        case Body.REFERENCE:
            return reference.quantized_matmul(x, weight, layer)
        case Body.TRITON:
            assert tiles is None or isinstance(tiles, TritonTiles)
            return triton.quantized_matmul(x, weight, layer, tiles=tiles, interpret=interpret)
        case Body.TPU:
            assert tiles is None or isinstance(tiles, TpuTiles)
            return tpu.quantized_matmul(x, weight, layer, tiles=tiles, interpret=interpret)
        case _:
            raise refuse("quantized_matmul", body, "does not exist", BODIES)
