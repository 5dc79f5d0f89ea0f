"""Means over counted rows, kept as sums, so that those of micro-batches and devices add up."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class RowMean(NamedTuple):
    """A mean in two parts: those of several batches add up, field by field, to the mean over all rows."""

    total: Float[Array, ""]
    num_rows: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, ""]:
        """The quotient; 0 where nothing was counted."""
        return self.total / jnp.maximum(self.num_rows, 1.0)


Metrics = dict[str, RowMean]


def count_true(is_counted: Bool[Array, "B L"]) -> Float[Array, ""]:
    """How many rows; float32."""
    return jnp.sum(is_counted, dtype=jnp.float32)


def mean_over(is_counted: Bool[Array, "B L"], values: Float[Array, "B L"]) -> RowMean:
    """The mean of the counted rows."""
    return RowMean(jnp.sum(jnp.where(is_counted, values, 0.0)), count_true(is_counted))


def means_by_depth(
    name: str,
    values: Float[Array, "B L"],
    is_counted: Bool[Array, "B L"],
    depth: Int[Array, "B L"],
    block_length: int,
) -> Metrics:
    """`<name>/depth_<d>` of every depth: the mean of its counted rows."""
    return {f"{name}/depth_{d}": mean_over(is_counted & (depth == d), values) for d in range(block_length)}
