"""Linear map with a low-rank update on chosen rows only: the contract of the op.

There is one body, plain XLA, on purpose. The update costs rank * (D + F) multiplications a row beside the D * F of the
base product (6 % at rank 128 for a 4096 x 4096 projection), and the promise that matters is that a row without the
update has the bits of the base model. That holds because the base product is one and the same expression with and
without an adapter; a fused kernel would have to repeat the summation order of whatever library runs the base.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gated_lora(
    x: Float[Array, "*M D"],
    kernel: Float[Array, "D F"],
    lora_a: Float[Array, "D r"],
    lora_b: Float[Array, "r F"],
    gate: Bool[Array, "*M"],
    scale: float,
) -> Float[Array, "*M F"]:
    """The product with a base weight, and a low-rank update on the rows whose gate is on.

    out[m] = x[m] kernel + scale * (gate[m] * (x[m] A)) B

    The gate acts between the two factors, where a row has `rank` elements instead of F. A row whose gate is off adds
    `scale * (0 B)`, which is 0 for a finite B, and so has the value of `x @ kernel` bit for bit (the sign of a zero
    aside: -0 + 0 is +0). Its gradient with respect to both factors is exactly 0.

    Args:
        x: rows, in any number of axes.
        kernel: base weight, in x's dtype.
        lora_a: shrink factor A, in x's dtype, as PEFT stores it transposed.
        lora_b: expand factor B, in x's dtype.
        gate: rows that get the update.
        scale: alpha / rank.

    Returns:
        The products, in x's dtype.

    Raises:
        ValueError: shapes disagree.
        TypeError: the arrays do not share one floating dtype, or `gate` is not boolean.

    Source: R-ISD of I-DLM (arXiv 2604.11035): the adapter acts on MASK rows alone.
    """
    if x.ndim < 2 or kernel.ndim != 2 or kernel.shape[0] != x.shape[-1]:
        raise ValueError(f"{kernel.shape=}, but {x.shape=} needs [D, F] with the D of [..., D]")
    if kernel.dtype != x.dtype:
        raise TypeError(f"kernel.dtype={kernel.dtype}, but all arrays need one floating dtype, {x.dtype=}")
    _check(x, lora_a, lora_b, gate, kernel.shape[1])
    return x @ kernel + _update(x, lora_a, lora_b, gate, scale)


def gated_update(
    x: Float[Array, "*M D"],
    lora_a: Float[Array, "D r"],
    lora_b: Float[Array, "r F"],
    gate: Bool[Array, "*M"],
    scale: float,
) -> Float[Array, "*M F"]:
    """What `gated_lora` adds, for a base product that is made elsewhere; same arguments and errors."""
    _check(x, lora_a, lora_b, gate, lora_b.shape[-1])
    return _update(x, lora_a, lora_b, gate, scale)


def _update(x: Array, lora_a: Array, lora_b: Array, gate: Array, scale: float) -> Array:
    shrunk = jnp.where(gate[..., None], x @ lora_a, 0)
    return scale * (shrunk @ lora_b)


def _check(x: Array, lora_a: Array, lora_b: Array, gate: Array, columns: int) -> None:
    width, rank = x.shape[-1], lora_a.shape[-1]
    if lora_a.shape != (width, rank) or lora_b.shape != (rank, columns):
        raise ValueError(f"{lora_a.shape=} and {lora_b.shape=}, but {x.shape=} needs [{width}, r], [r, {columns}]")
    if gate.shape != x.shape[:-1]:
        raise ValueError(f"{gate.shape=}, but {x.shape=} needs {x.shape[:-1]}")
    for name, array in {"lora_a": lora_a, "lora_b": lora_b}.items():
        if array.dtype != x.dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}.dtype={array.dtype}, but all arrays need one floating dtype, {x.dtype=}")
    if gate.dtype != jnp.bool_:
        raise TypeError(f"{gate.dtype=} must be bool")
