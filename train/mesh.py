"""Where the arrays of a run live: the mesh, the sharding of state and batches, and ops that run device by device.

`jax.jit` does the partitioning; only ops that XLA cannot or should not cut by itself (kernels, compaction of rows) are
wrapped by `per_device`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from idlm_jax.config import ModelConfig
from idlm_jax.model.transformer import PARAM_AXES
from idlm_jax.sharding import param_spec
from train.config import MeshShape, TrainConfig

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))  # batch rows
HEADS = P(("data", "fsdp"), None, "tensor")  # [B, L, heads, H]
TOKENS = P(("data", "fsdp"), "tensor")  # [B, L, ...]: work that every token needs alone


def make_mesh(shape: MeshShape, devices: Sequence[Any]) -> Mesh | None:
    """The mesh of a run; None for a run on one device, which needs none.

    Args:
        shape: devices per axis; one may be -1 and takes the rest.
        devices: all that there are. A shape without -1 may use fewer, the first ones.

    Raises:
        ValueError: the shape needs more devices than there are, or -1 leaves a remainder.
    """
    sizes = [shape.data, shape.fsdp, shape.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if len(devices) % fixed:
            raise ValueError(f"{shape}: {len(devices)} devices are no multiple of {fixed}")
        sizes[sizes.index(-1)] = len(devices) // fixed
    count = math.prod(sizes)
    if count > len(devices):
        raise ValueError(f"{shape} needs {count} devices, but there are {len(devices)}")
    if count == 1:
        return None
    # Auto is named because jax.make_mesh would default to Explicit.
    return Mesh(np.asarray(devices[:count]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(mesh: Mesh, config: TrainConfig, model: ModelConfig, row_len: int) -> None:
    """Raises ValueError where a run's sizes do not divide over its mesh."""
    rows, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    part = config.batch_size // config.gradient_accumulation_steps
    if part % rows:
        raise ValueError(
            f"batch_size / gradient_accumulation_steps = {part} rows do not divide over data x fsdp = {rows} devices"
        )
    for name, size in {"num_kv_heads": model.num_kv_heads, "max_seq_len": row_len}.items():
        if size % tensor:
            raise ValueError(f"mesh.tensor={tensor} does not divide {name}={size}")


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a train state, or of a part of it.

    Optimizer moments lie as their parameters do; counters are on every device.

    Args:
        state: pytree of arrays or shapes; parameters are found by the names in their paths.
        mesh: from `make_mesh`.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, param_spec(param_axes(names), leaf.shape, mesh) if leaf.ndim and names else P())

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def param_axes(path: tuple[str, ...]) -> str:
    """Axis letters of a parameter, adapters included; a factor's wide axis is named by its first letter.

    A kernel [L, D, N, H] has the factors A [L, D, R] and B [L, R, N * H].
    """
    if path[-1] not in ("lora_a", "lora_b"):
        return PARAM_AXES[path]
    inner, outer = PARAM_AXES[(*path[:-1], "kernel")][1], PARAM_AXES[(*path[:-1], "kernel")][-1]
    if inner == "D":
        outer = PARAM_AXES[(*path[:-1], "kernel")][2]
    return f"L{inner}R" if path[-1] == "lora_a" else f"LR{outer}"


def per_device(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`fn` on each device's own part under the mesh that is set, or `fn` itself where none is.

    Gradients of inputs that every device has whole are summed over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
