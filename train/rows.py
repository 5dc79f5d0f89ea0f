"""Rows of a global batch: which of them this process reads, and how they become one array over all devices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from train.batch import Batch
from train.mesh import ROWS


def local_rows(mesh: Mesh | None, batch_size: int) -> Sequence[int]:
    """The rows that devices of this process hold, ascending; every row without a mesh.

    Raises:
        ValueError: there are several processes, and the mesh leaves devices out.
    """
    if jax.process_count() > 1 and (mesh is None or mesh.size != jax.device_count()):
        raise ValueError(
            f"the mesh covers {1 if mesh is None else mesh.size} of the {jax.device_count()} devices of "
            f"{jax.process_count()} processes: several processes must use all (mesh.fsdp=-1)"
        )
    if mesh is None:
        return range(batch_size)
    parts = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part for row in range(*part[0].indices(batch_size))})


def place(batch: Batch, mesh: Mesh | None, batch_size: int) -> Batch:
    """The global batch [B, L] on the devices, each with its rows, from the `local_rows` of it on every host."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])), batch
    )


def abstract_batch(batch_size: int, row_len: int, mesh: Mesh | None) -> Batch:
    """The shapes of a global batch, where `place` puts it."""
    sharding = None if mesh is None else NamedSharding(mesh, ROWS)

    def blank() -> Batch:
        index = jnp.zeros((batch_size, row_len), jnp.int32)
        return Batch(index, index, index, index != 0, index)

    shapes = jax.eval_shape(blank)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
