"""Loops over tiles of the rows that matter: which rows those are, and how a tile of them is read and written.

Shared by the ops that end in a matrix product with the vocabulary, in plain XLA. The rows that matter are
numbered first, so that a loop over them ends with the last one, whatever the number of rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def compact(is_kept: Bool[Array, " R"], tile_rows: int) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """Numbers of the kept rows, ascending, then numbers past the end; and how many tiles hold a kept row.

    Reads past the end give 0 and writes there are dropped, so the last tile needs no mask of its own.
    """
    num_rows = is_kept.shape[0]
    num_kept = jnp.sum(is_kept, dtype=jnp.int32)
    places = jnp.arange(-(-num_rows // tile_rows) * tile_rows, dtype=jnp.int32)
    kept = jnp.nonzero(is_kept, size=places.size, fill_value=0)[0].astype(jnp.int32)
    # Distinct and ascending past the end too, so that gathers and scatters may be declared sorted and unique.
    index = jnp.where(places < num_kept, kept, num_rows + places)
    return index, (num_kept + tile_rows - 1) // tile_rows


def tile_index(index: Int[Array, " P"], number: Int[Array, ""], tile_rows: int) -> Int[Array, " I"]:
    """The rows of one tile."""
    return jax.lax.dynamic_slice_in_dim(index, number * tile_rows, tile_rows)


def take(array: Array, rows: Int[Array, " I"]) -> Array:
    """Rows of an array; 0 past its end."""
    return array.at[rows].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)


def put(array: Array, rows: Int[Array, " I"], values: Array) -> Array:
    """The array with some rows replaced; those past its end are dropped."""
    return array.at[rows].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)
