"""Tensor parallelism: one model over several devices of one process, cut by key heads, columns and vocabulary.

The plan of a step is made once, on the host, and its words reach every device; nothing else distinguishes a mesh from
one device.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from idlm_jax.config import ModelConfig
from idlm_jax.decoding.state import DecodeState
from idlm_jax.model.kv_cache import POOL_SPEC
from idlm_jax.model.language_model import LanguageModel


def serving_mesh(tp_size: int) -> Mesh | None:
    """The first `tp_size` devices as one axis "tensor", for `idlm_jax.load`; None for one device, which needs no mesh.

    Raises:
        ValueError: there are fewer devices, or several processes whose devices are not all used.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size} must be at least 1")
    devices = jax.devices()
    if jax.process_count() > 1 and tp_size != len(devices):
        raise ValueError(
            f"tp_size={tp_size} must be the {len(devices)} devices of all {jax.process_count()} processes together"
        )
    if tp_size == 1:
        return None
    if tp_size > len(devices):
        raise ValueError(
            f"tp_size={tp_size} needs as many devices, but there are {len(devices)}: {devices[0].platform}"
        )
    return Mesh(np.asarray(devices[:tp_size]), ("tensor",), axis_types=(AxisType.Auto,))


def check_heads(config: ModelConfig, tp_size: int) -> None:
    """Raises ValueError where the devices cannot share out the key heads."""
    if config.num_kv_heads % tp_size:
        allowed = [size for size in range(1, config.num_kv_heads + 1) if config.num_kv_heads % size == 0]
        raise ValueError(
            f"tp_size={tp_size} does not divide the model's {config.num_kv_heads} key heads: it may be one of {allowed}"
        )


def mesh_of(lm: LanguageModel) -> Mesh | None:
    """The mesh that the model was loaded on; None for one device.

    Raises:
        ValueError: it has an axis beside "tensor", or does not divide the key heads.
    """
    sharding = jax.tree.leaves(lm.params)[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    if mesh.axis_names != ("tensor",):
        raise ValueError(f"the model was loaded on {dict(mesh.shape)}, but serving cuts over 'tensor' alone")
    check_heads(lm.config, mesh.size)
    return mesh


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has."""
    return NamedSharding(mesh, P())


def state_shardings(state: DecodeState, mesh: Mesh) -> Any:
    """A `NamedSharding` for every leaf: the pool is cut over key heads, what there is of requests is on every device.

    Args:
        state: arrays or shapes.
        mesh: from `serving_mesh`.
    """
    everywhere = jax.tree.map(lambda _: whole(mesh), state)
    return everywhere._replace(cache=jax.tree.map(lambda _: NamedSharding(mesh, POOL_SPEC), state.cache))


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree`, on devices."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)
