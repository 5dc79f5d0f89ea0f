"""Compiles for an H200 and for TPUs on a machine that has neither: real compilers, bytes per device.

Shows that a program lowers, fits and shards. Shows nothing of speed or of numerics: nothing runs.
Needs jax 0.11, libtpu, and the CUDA plugin with ptxas, as `make test-next` installs them; set `TPU_SKIP_MDS_QUERY=1`
and `ALLOW_MULTIPLE_LIBTPU_LOAD=1`, or libtpu asks a metadata server for minutes and locks a chip that is not there.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

# What XLA:GPU asks of a device before it compiles for it (xla.StreamExecutorGpuDeviceInfo): H100 and H200 SXM, which
# differ in their memory.
_HOPPER = """
platform_name: "CUDA"
device_description_str: "%(kind)s"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: %(bandwidth)d
  device_memory_size: %(memory)d
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def gpu_devices(kind: str, memory: int, hosts: int, per_host: int) -> Sequence[Any]:
    """Hopper GPUs that exist only for the compiler.

    Args:
        kind: "NVIDIA H100" or "NVIDIA H200".
        memory: bytes of each.
        hosts: machines.
        per_host: GPUs in each.

    Raises:
        RuntimeError: JAX's CUDA plugin is not installed.
    """
    bandwidth = 4.8e12 if kind == "NVIDIA H200" else 3.35e12
    target = _HOPPER % {"kind": kind, "memory": memory, "bandwidth": bandwidth}
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x{hosts}x{per_host}"
        )
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(f"compiling for {kind} needs jax 0.11 and its CUDA plugin (jax[cuda13]): {error}") from None
    return described.devices


def tpu_devices(topology: str) -> Sequence[Any]:
    """The chips of a named topology, such as 'v5e:2x2', 'v6e:2x2' or 'v5p:4x4x4', that exist only for the compiler.

    Raises:
        RuntimeError: libtpu is not installed.
    """
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(f"compiling for {topology} needs libtpu (jax[tpu]): {error}") from None


def h200_mesh(shape: Sequence[int] = (1,), axes: Sequence[str] = ("data",)) -> Mesh:
    """A mesh of H200s of one host that exist only for the compiler."""
    return _mesh(gpu_devices("NVIDIA H200", 143_000_000_000, 1, int(np.prod(shape))), shape, axes)


def tpu_mesh(topology: str, shape: Sequence[int], axes: Sequence[str]) -> Mesh:
    """A mesh over the first chips of a named topology (`tpu_devices`)."""
    return _mesh(tpu_devices(topology), shape, axes)


def on_mesh(tree: Any, mesh: Mesh, spec: PartitionSpec | Callable[[tuple[Any, ...]], PartitionSpec]) -> Any:
    """Puts abstract arrays on `mesh`.

    Args:
        tree: pytree whose leaves have a shape and a dtype.
        mesh: devices.
        spec: one spec for every leaf, or a function of the leaf's key path.
    """

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        of_leaf = spec if isinstance(spec, PartitionSpec) else spec(path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, of_leaf))

    return jax.tree_util.tree_map_with_path(placed, tree)


class Launch(NamedTuple):
    """One kernel of a compiled GPU program."""

    name: str
    grid: tuple[int, ...]
    threads: int
    shared_memory_bytes: int


_LAUNCH = re.compile(r"\] (\S+) grid: \[([\d, ]+)\] threads: \[(\d+),.*shared_memory: (\d+) bytes")


def compile_and_list(
    mesh: Mesh, fn: Callable[..., Any], *args: Any, **jit_options: Any
) -> tuple[Compiled, list[Launch]]:
    """`compile_for` a GPU, with the kernels of the program in order, those of a loop's body once."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_for(mesh, fn, *args, dump=folder, **jit_options)
        (sequence,) = Path(folder).glob("*.thunk_sequence.txt")
        found = _LAUNCH.findall(sequence.read_text())
    return compiled, [
        Launch(name, tuple(int(size) for size in grid.split(",")), int(threads), int(shared))
        for name, grid, threads, shared in found
    ]


def compile_for(
    mesh: Mesh, fn: Callable[..., Any], *args: Any, dump: str | None = None, **jit_options: Any
) -> Compiled:
    """Compiles `fn` for the devices of `mesh`.

    Args:
        mesh: from `h200_mesh` or `tpu_mesh`.
        fn: pure function of `args`.
        *args: pytrees of abstract arrays placed by `on_mesh`.
        dump: folder for what the GPU compiler writes about its work.
        **jit_options: passed to `jax.jit` (donate_argnums, out_shardings, ...).

    Returns:
        The executable: `memory_analysis()` is per device, `as_text()` the optimised HLO.
    """
    jitted = jax.jit(fn, **jit_options)
    # Lowering has to be asked for by name, or it seeks a live device. Pallas reads the kind of device from the
    # abstract mesh.
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    with jax.sharding.use_abstract_mesh(_abstract_mesh(mesh)):
        lowered = jitted.trace(*args).lower(lowering_platforms=("tpu" if is_tpu else "cuda",))
    if is_tpu:
        return lowered.compile()
    # Autotuning would have to run its candidates.
    options: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}
    if dump:
        options["xla_dump_to"] = dump
    return lowered.compile(compiler_options=options)


def _mesh(devices: Sequence[Any], shape: Sequence[int], axes: Sequence[str]) -> Mesh:
    count = int(np.prod(shape))
    if len(devices) < count:
        raise ValueError(f"a mesh of {tuple(shape)} needs {count} devices, the topology has {len(devices)}")
    # Auto is named because jax.make_mesh, elsewhere in the project, would default to Explicit.
    return Mesh(np.array(devices[:count]).reshape(shape), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _abstract_mesh(mesh: Mesh) -> AbstractMesh:
    from jax._src.mesh import AbstractDevice  # no public name yet (jax 0.11.2)

    first = mesh.devices.flat[0]
    if first.platform == "tpu":
        device = AbstractDevice(device_kind=first.device_kind, num_cores=first.num_cores, platform="tpu")
    else:
        device = AbstractDevice(device_kind=first.device_kind, num_cores=132, platform="gpu")
    return AbstractMesh(tuple(mesh.shape.values()), mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device)
