"""From a checked checkpoint to sharded parameters, one tensor at a time, and on to a module state."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from idlm_jax.config import DType, ModelConfig
from idlm_jax.model.transformer import Qwen3
from idlm_jax.sharding import param_sharding
from idlm_jax.weights.checkpoint import Checkpoint
from idlm_jax.weights.hf_names import TensorSpec

Params = dict[tuple[str, ...], Float[Array, "..."]]


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
        Arrays by parameter path, blocks stacked over layers, in `config.param_dtype`.
    """
    params: Params = {}
    for spec in specs:
        layout = dataclasses.replace(spec, name="", layer=None)
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


def flat_variables(params: nnx.State) -> dict[tuple[str, ...], nnx.Variable]:
    """Variables by path; Qwen3 has attributes only, so every key is a string."""
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}


def build_state(
    config: ModelConfig, params: Mapping[tuple[str, ...], Float[Array, "..."]]
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
