"""Where the arrays of a run live: the mesh, the sharding of state and batches, and ops that run device by device.

`jax.jit` does the partitioning; only ops that XLA cannot or should not cut by itself (kernels, compaction of rows) are
wrapped by `per_device`. Sequences are cut over "context" everywhere but inside attention, where the devices of a
sequence hold all of its rows and cut the heads instead (docs/decisions/0009).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from idlm_jax.array_types import Keys, Queries
from idlm_jax.config import ModelConfig
from idlm_jax.model.markov_head import MARKOV_AXES
from idlm_jax.model.transformer import PARAM_AXES
from idlm_jax.sharding import param_spec
from train.config import MeshShape, TrainConfig

AXES = ("data", "fsdp", "context", "tensor")
_BATCH = ("data", "fsdp")
ROWS = P(_BATCH)  # [B, ...]: batch rows
STREAM = P(_BATCH, "context")  # [B, T, ...]: hidden states, and whatever goes with them
TOKENS = P(_BATCH, ("context", "tensor"))  # [B, T, ...]: work that every token needs alone
_OUTSIDE = P(_BATCH, "context", "tensor")  # [B, T, heads, H]: around attention
_INSIDE = P(_BATCH, None, ("tensor", "context"))  # in attention: whole sequences, some of the heads
_GATHERED = P(_BATCH, None, "tensor")  # keys of whole sequences, where there are fewer key heads than devices


def make_mesh(shape: MeshShape, devices: Sequence[Any]) -> Mesh | None:
    """The mesh of a run; None for a run on one device, which needs none.

    Args:
        shape: devices per axis; one may be -1 and takes the rest.
        devices: all that there are. A shape without -1 may use fewer, the first ones.

    Raises:
        ValueError: the shape needs more devices than there are, or -1 leaves a remainder.
    """
    sizes = [shape.data, shape.fsdp, shape.context, shape.tensor]
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
    # A part of the devices need not be a part of the wiring: it is taken as it comes.
    grid = arrange(devices, sizes) if count == len(devices) else np.asarray(devices[:count]).reshape(sizes)
    # Auto is named because jax.make_mesh would default to Explicit.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """All devices by mesh axis: the first axes go across TPU slices or GPU hosts, the last stay inside, by the wires.

    Args:
        devices: of one kind, as many in each slice or host.
        sizes: of the axes, those that talk least first; their product is the number of devices.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    by_process = num_slices == 1 and devices[0].platform == "gpu"
    left = len({device.process_index for device in devices}) if by_process else num_slices
    if left == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    across = []
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    inside = [size // part for size, part in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def check_mesh(mesh: Mesh, config: TrainConfig, model: ModelConfig, row_len: int) -> None:
    """Raises ValueError where a run's sizes do not divide over its mesh."""
    rows, context, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"], mesh.shape["tensor"]
    part = config.batch_size // config.gradient_accumulation_steps
    if part % rows:
        raise ValueError(
            f"batch_size / gradient_accumulation_steps = {part} rows do not divide over data x fsdp = {rows} devices"
        )
    for name, size in {"num_kv_heads": model.num_kv_heads, "vocab_size": model.vocab_size}.items():
        if size % tensor:
            raise ValueError(f"mesh.tensor={tensor} does not divide {name}={size}")
    if row_len % (context * tensor):
        raise ValueError(f"mesh.context x mesh.tensor = {context * tensor} does not divide max_seq_len={row_len}")
    key_heads = model.num_kv_heads // tensor
    if model.num_heads % (context * tensor) or (key_heads % context and context % key_heads):
        raise ValueError(
            f"mesh.context x mesh.tensor = {context * tensor} cannot share out num_heads={model.num_heads} and "
            f"num_kv_heads={model.num_kv_heads}: inside attention the devices of a sequence cut its heads"
        )


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


def on_host(sharding: Any) -> Any:
    """The same layout in the memory of the host that holds each device."""
    return jax.tree.map(lambda each: each.with_memory_kind("pinned_host"), sharding)


def param_axes(path: tuple[str, ...]) -> str:
    """Axis letters of a parameter, adapters included; a factor's wide axis is named by its first letter.

    A kernel [L, D, N, H] has the factors A [L, D, R] and B [L, R, N * H].
    """
    if path[-1] not in ("lora_a", "lora_b"):
        return (PARAM_AXES | MARKOV_AXES)[path]
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


def vocab_axis() -> str | None:
    """The axis over which the head is cut inside `per_device`; None where it is whole."""
    return "tensor" if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1 else None


def along_stream(array: Array) -> Array:
    """[B, T, ...] with each sequence cut over "context", under the mesh that is set."""
    return _lay(array, STREAM)


def for_lookup(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """An embedding as a lookup of rows cut over "context" can read it: itself not cut over "context".

    Left to itself, XLA finds no way from columns over "context" to rows over it, and makes the table and the sum of its
    gradient whole on every device, in float32.
    """
    whole = table.shape[1] % jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    return _lay(table, P("tensor", None if whole else "fsdp"))


def per_head(fn: Callable[[Queries, tuple[Keys, ...], Any], Queries]) -> Callable[..., Queries]:
    """Attention `fn(q, keys, rows)` on each device's own heads, given whole sequences of them.

    Around the call a device holds its part of each sequence and, under "tensor", its heads: an exchange before and
    one after turn parts of sequences into heads and back. A device whose query heads share one key head with its
    neighbours' gets that head.

    Args:
        fn: of q [B, T, N, H], keys and values [B, S, K, H], and a pytree of arrays [B, ...].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn
    context = mesh.shape["context"]

    def attend(q: Queries, keys: tuple[Keys, ...], rows: Any) -> Queries:
        is_shared = keys[0].shape[2] // mesh.shape["tensor"] % context != 0

        def local(q: Queries, keys: tuple[Keys, ...], rows: Any) -> Queries:
            if is_shared:
                keys = tuple(_own_head(each, num_devices=context) for each in keys)
            return fn(q, keys, rows)

        in_specs = (_INSIDE, _GATHERED if is_shared else _INSIDE, ROWS)
        mix = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=_INSIDE, check_vma=False)
        return _lay(mix(_lay(q, _OUTSIDE), tuple(_lay(each, _OUTSIDE) for each in keys), rows), _OUTSIDE)

    return attend


def layer_stack(like: jax.ShapeDtypeStruct, num_layers: int) -> Array:
    """Zeros for what `per_head` takes as keys, of every layer: [layers, B, T, K, H]."""
    return _lay(jnp.zeros((num_layers, *like.shape), like.dtype), P(None, *_OUTSIDE))


def _own_head(heads: Keys, *, num_devices: int) -> Float[Array, "B T 1 H"]:
    """The one key head that this device's query heads read, of those of its "context" group."""
    number = jax.lax.axis_index("context") * heads.shape[2] // num_devices
    return jax.lax.dynamic_slice_in_dim(heads, number, 1, axis=2)


def _lay(array: Array, spec: P) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(array, spec)
