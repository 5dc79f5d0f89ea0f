"""What the contract's functions refuse before anything is traced further."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.bodies import Body
from pallas_kernels.verify.rows import Sampling
from pallas_kernels.verify.tiles import TpuTiles, TritonTiles

LOGIT_DTYPES = (jnp.float32, jnp.bfloat16)


def check_logits(name: str, logits: Array, expected: tuple[int, ...]) -> None:
    """Raises unless `logits` has the expected shape, entries, and a dtype that the kernels read."""
    if logits.shape != expected or 0 in logits.shape[-1:]:
        raise ValueError(f"{name}.shape={logits.shape}, but {expected} with a vocabulary is expected")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}.dtype={logits.dtype} is neither float32 nor bfloat16")


def check_array(name: str, values: Array, expected: tuple[int, ...], kind: type) -> None:
    """Raises unless `values` has the expected shape and kind of dtype."""
    if values.shape != expected:
        raise ValueError(f"{name}.shape={values.shape}, but the logits imply {expected}")
    if not jnp.issubdtype(values.dtype, kind):
        raise TypeError(f"{name}.dtype={values.dtype} is no {kind.__name__} dtype")


def check_sampling(sampling: Sampling, first_position: Array, batch: int) -> None:
    """Raises unless every field has one entry per request."""
    check_array("temperature", sampling.temperature, (batch,), jnp.floating)
    check_array("top_k", sampling.top_k, (batch,), jnp.integer)
    check_array("top_p", sampling.top_p, (batch,), jnp.floating)
    check_array("seed", sampling.seed, (batch,), jnp.uint32)
    check_array("first_position", first_position, (batch,), jnp.integer)


def check_tiles(body: Body, tiles: TritonTiles | TpuTiles | None) -> None:
    """Raises if `tiles` are those of another body."""
    expected = {Body.TRITON: TritonTiles, Body.TPU: TpuTiles}.get(body)
    if tiles is not None and (expected is None or not isinstance(tiles, expected)):
        raise ValueError(f"{tiles=} is not for the {body.value} body")
