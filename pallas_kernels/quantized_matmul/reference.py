"""The op in plain jnp: XLA decides whether the converted weight is ever written to memory."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized_matmul.maths import precision_of
from pallas_kernels.quantized_matmul.weights import QuantizedWeight, layer_of


def quantized_matmul(
    x: Float[Array, "M D"], weight: QuantizedWeight, layer: Int[Array, ""] | None = None
) -> Float[Array, "M F"]:
    """The op as its contract states it; see the package for arguments and rules."""
    if layer is not None:
        weight = layer_of(weight, layer)
    sums = jnp.einsum(
        "MD,DF->MF",
        x,
        weight.values.astype(x.dtype),
        preferred_element_type=jnp.float32,
        precision=precision_of(x.dtype),
    )
    return (sums * weight.scale[None, :]).astype(x.dtype)
