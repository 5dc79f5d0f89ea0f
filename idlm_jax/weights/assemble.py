"""From a checked checkpoint to sharded parameters, one tensor at a time, and on to a module state."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Num

from idlm_jax.config import DType, ModelConfig
from idlm_jax.model.transformer import QUANTIZED_AXES, Qwen3
from idlm_jax.sharding import param_sharding
from idlm_jax.weights.checkpoint import Checkpoint
from idlm_jax.weights.hf_names import TensorSpec
from pallas_kernels.quantized_matmul import VALUE_DTYPES, Form, quantize

Params = dict[tuple[str, ...], Num[Array, "..."]]


def read_params(checkpoint: Checkpoint, specs: Iterable[TensorSpec], config: ModelConfig, mesh: Mesh | None) -> Params:
    """Reads every tensor into its place in the stacked, sharded parameters.

    Each tensor travels to the devices in Hugging Face layout, already cut over the mesh, and is transposed
    there while it is written into its stack, whose buffer is donated. Beyond the result, memory holds one
    tensor on the host and one tensor, with its transpose, on the devices.

    Args:
        checkpoint: passed `check` for these specs.
        specs: tensors to read.
        config: gives the number of layers and the parameter dtype.
        mesh: mesh with Auto axes, or None for the default device.

    Returns:
        Arrays by parameter path, blocks stacked over layers, in `config.param_dtype`; where `config.quantize` asks for
        it, kernels as the values and scales of their stored bits.
    """
    params: Params = {}
    for spec in specs:
        layout = dataclasses.replace(spec, name="", layer=None)
        if config.quantize is not None and spec.path[-1] == "kernel":
            _read_quantized(params, checkpoint, spec, config.quantize, config.num_layers, mesh)
            continue
        if spec.layer is None:
            sharding = param_sharding(spec.axes, spec.shape, mesh)
            written = _write(None, _put(checkpoint, spec, mesh), None, layout, config.param_dtype, sharding)
        else:
            shape = (config.num_layers, *spec.shape)
            sharding = param_sharding("L" + spec.axes, shape, mesh)
            if spec.path not in params:
                params[spec.path] = jnp.zeros(shape, config.param_dtype, device=sharding)
            # Popped: the donated buffer must not stay reachable.
            stack, layer = params.pop(spec.path), np.int32(spec.layer)
            written = _write(stack, _put(checkpoint, spec, mesh), layer, layout, config.param_dtype, sharding)
        # Dispatch is asynchronous: without the wait, reads would run ahead and pile up tensors on the host.
        params[spec.path] = jax.block_until_ready(written)
    return params


def _read_quantized(
    params: Params, checkpoint: Checkpoint, spec: TensorSpec, form: Form, num_layers: int, mesh: Mesh | None
) -> None:
    """Adds one layer of a kernel, from its stored bits, to its values and scales in `params`."""
    assert spec.layer is not None  # kernels are in blocks
    num_out, num_in = spec.hf_shape
    shapes = {"values": (num_layers, num_in, num_out), "scale": (num_layers, num_out)}
    dtypes = {"values": VALUE_DTYPES[form], "scale": jnp.float32}
    paths = {part: (*spec.path[:-1], part) for part in shapes}
    shardings = {part: param_sharding(QUANTIZED_AXES[paths[part]], shapes[part], mesh) for part in shapes}
    for part, path in paths.items():
        if path not in params:
            params[path] = jnp.zeros(shapes[part], dtypes[part], device=shardings[part])
    stacks = tuple(params.pop(path) for path in paths.values())
    layout = dataclasses.replace(spec, name="", layer=None)
    tensor, layer = _put(checkpoint, spec, mesh), np.int32(spec.layer)
    written = _write_quantized(stacks, tensor, layer, layout, form, tuple(shardings.values()))
    params |= zip(paths.values(), jax.block_until_ready(written), strict=True)


def _put(checkpoint: Checkpoint, spec: TensorSpec, mesh: Mesh | None) -> Float[Array, "..."]:
    sharding = param_sharding(spec.hf_axes, spec.hf_shape, mesh)
    if sharding is None:
        return jnp.asarray(checkpoint.read(spec.name))
    return jax.make_array_from_callback(spec.hf_shape, sharding, lambda index: checkpoint.read(spec.name, index))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _write(
    stack: Float[Array, "..."] | None,
    tensor: Float[Array, "..."],
    layer: Int[Array | np.generic, ""] | None,
    layout: TensorSpec,
    dtype: DType,
    sharding: NamedSharding | None,
) -> Float[Array, "..."]:
    """One Hugging Face tensor in our layout and dtype: alone, or written over one layer of `stack` (donated).

    `layout` is the tensor's spec without name and layer, so that all layers share one compiled program.
    """
    written = layout.from_hf(tensor).astype(dtype)
    if stack is not None and layer is not None:
        written = jax.lax.dynamic_update_index_in_dim(stack, written, layer, 0)
    return written if sharding is None else jax.lax.with_sharding_constraint(written, sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _write_quantized(
    stacks: tuple[Num[Array, "..."], ...],
    tensor: Float[Array, "..."],
    layer: Int[Array | np.generic, ""],
    layout: TensorSpec,
    form: Form,
    shardings: tuple[NamedSharding | None, ...],
) -> tuple[Num[Array, "..."], ...]:
    """`_write` for the values and scales of a kernel, whose stacks are donated."""
    weight = quantize(layout.from_hf(tensor).reshape(layout.hf_shape[::-1]), form)
    written = (
        jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0) for stack, part in zip(stacks, weight, strict=True)
    )
    return tuple(
        array if where is None else jax.lax.with_sharding_constraint(array, where)
        for array, where in zip(written, shardings, strict=True)
    )


def flat_variables(params: nnx.State) -> dict[tuple[str, ...], nnx.Variable]:
    """Variables by path; Qwen3 has attributes only, so every key is a string."""
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}


def build_state(
    config: ModelConfig, params: Mapping[tuple[str, ...], Num[Array, "..."]]
) -> tuple[nnx.GraphDef[Qwen3], nnx.State]:
    """The split module with `params` in it; no parameter is ever drawn.

    Raises:
        ValueError: `params` are not exactly the parameters of such a module.
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    wanted = flat_variables(abstract)
    found = {path: array.shape for path, array in params.items()}
    if found != {path: variable.shape for path, variable in wanted.items()}:
        raise ValueError(f"parameters {found} are not those of {config}")
    flat = [(path, variable.replace(params[path])) for path, variable in wanted.items()]
    return graph, nnx.from_flat_state(flat)
