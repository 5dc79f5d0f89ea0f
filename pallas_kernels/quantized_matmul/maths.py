"""The arithmetic that every body shares, on 2-D tiles."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 for float32 inputs: the default is TF32 on NVIDIA and one bfloat16 pass on TPU."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def tile_product(x: Float[Array, "m d"], values: Num[Array, "d f"]) -> Float[Array, "m f"]:
    """float32 products of one tile along D; 8-bit values are exact in bfloat16."""
    return jax.lax.dot_general(
        x,
        values.astype(x.dtype),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision_of(x.dtype),
    )


def finish(sums: Float[Array, "m f"], scale: Float[Array, "1 f"], dtype: jnp.dtype) -> Float[Array, "m f"]:
    """Applies the scales once and rounds once."""
    return (sums * jnp.broadcast_to(scale, sums.shape)).astype(dtype)
