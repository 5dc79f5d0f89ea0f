"""Which parameter axis is cut over which mesh axis; batch and activation sharding belong to the callers."""

import math

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Letters as in `array_types`; letters that are absent (L, H, R) are never cut. Width over "fsdp" and
# everything that is wide over "tensor" leaves each 2-D weight cut in both directions, and each block needs
# one all-reduce per half. The devices that share a sequence ("context") work on all of a weight in turn, as those
# of "fsdp" do, so none of them needs to keep the whole.
AXIS_TO_MESH: dict[str, tuple[str, ...]] = {
    "D": ("fsdp", "context"),
    "V": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
}


def param_spec(axes: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Mesh axis of every array axis, None where the array axis stays whole.

    An array axis stays whole when the table does not name it, when the mesh lacks its mesh axis, or when the
    mesh axis does not divide it (two key/value heads on a four-way "tensor" axis are replicated).

    Args:
        axes: one letter per array axis, "LDNH".
        shape: sizes of those axes.
        mesh: mesh whose axes are all `AxisType.Auto`.

    Raises:
        ValueError: letters and sizes differ in number, two letters want the same mesh axis, or the mesh has
            an axis that is not Auto (the default of `jax.make_mesh`).
    """
    if len(axes) != len(shape):
        raise ValueError(f"{axes=} names {len(axes)} axes, but {shape=} has {len(shape)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"{mesh.axis_types=} must all be Auto: pass axis_types=(AxisType.Auto, ...) to make_mesh")
    wanted = [AXIS_TO_MESH.get(letter, ()) for letter in axes]
    used = [name for names in wanted for name in names]
    if len(set(used)) < len(used):
        raise ValueError(f"{axes=} would cut two axes over one mesh axis: {dict(zip(axes, wanted, strict=True))}")
    return PartitionSpec(*(_cut(names, size, mesh) for names, size in zip(wanted, shape, strict=True)))


def _cut(names: tuple[str, ...], size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    present = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    if not present or size % math.prod(mesh.shape[name] for name in present):
        return None
    return present[0] if len(present) == 1 else present


def param_sharding(axes: str, shape: tuple[int, ...], mesh: Mesh | None) -> NamedSharding | None:
    """`param_spec` on its mesh; None, the default device, without a mesh.

    Args:
        axes: one letter per array axis.
        shape: sizes of those axes.
        mesh: mesh with Auto axes, or None for a single device.

    Raises:
        ValueError: as in `param_spec`.
    """
    return None if mesh is None else NamedSharding(mesh, param_spec(axes, shape, mesh))
