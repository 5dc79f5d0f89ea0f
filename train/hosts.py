"""Several processes as one run, once they have met (`idlm_jax.cluster`): the few moments at which they must agree.

Process 0 alone writes for people (metrics, progress, exports); checkpoints are written by all.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from idlm_jax import cluster


class StopVote:
    """Ends a run after the same step in every process, once any of them is asked to.

    Each step's votes are joined on the devices behind the step itself, and read one step later, so nobody waits.
    """

    def __init__(self) -> None:
        self._is_alone = jax.process_count() == 1
        self._mesh = Mesh(np.asarray(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def cast(self, is_asked: bool) -> bool:
        """Votes once a step; True once some process voted so, at this step or, among several, at the one before."""
        if self._is_alone:
            return is_asked
        every = NamedSharding(self._mesh, PartitionSpec("devices"))
        votes = jax.make_array_from_callback((self._mesh.size,), every, lambda index: np.full(1, is_asked))
        last, self._last = self._last, self._any(votes)
        return last is not None and bool(last)


def gather_to_first(tree: Any) -> Any:
    """`tree` with its arrays whole, in the host memory of process 0; None elsewhere. Every process takes part.

    Beyond the result, a device holds one whole array at a time.
    """
    if jax.process_count() == 1:
        return tree
    arrays, structure = jax.tree.flatten(tree)
    host = jax.local_devices(backend="cpu")[0]
    whole = []
    for array in arrays:
        gathered = multihost_utils.process_allgather(array, tiled=True)
        if cluster.is_first():
            whole.append(jax.device_put(gathered, host))
    return jax.tree.unflatten(structure, whole) if cluster.is_first() else None
