"""Parameters, gathered from wherever they lie, in one safetensors file."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import save_file

from idlm_jax.config import DType
from idlm_jax.weights.assemble import flat_variables
from idlm_jax.weights.hf_names import TensorSpec


def write_tensors(params: nnx.State, specs: Iterable[TensorSpec], file: Path, dtype: DType) -> None:
    """Gathers the tensors of `specs` and writes them as one safetensors file that torch readers accept.

    Args:
        params: stacked, possibly sharded parameters.
        specs: tensors to write; all of them are on the host at once.
        file: destination; exists afterwards, complete or not.
        dtype: dtype of the file.

    Raises:
        OSError: the disk is full or not writable.
        NotImplementedError: parameters are spread over several processes.
    """
    arrays = flat_variables(params)
    tensors = {spec.name: _gather(arrays[spec.path][...], spec, dtype) for spec in specs}
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors wraps a full disk in its own class; callers handle files by OSError.
        raise OSError(f"cannot write {file.name}: {error}") from error
    # safetensors creates files for their owner alone; a server often runs as somebody else.
    file.chmod(0o644)


def _gather(array: Float[Array, "..."], spec: TensorSpec, dtype: DType) -> Float[np.ndarray, "..."]:
    if not array.is_fully_addressable:
        raise NotImplementedError(
            f"{'.'.join(spec.path)} is spread over several processes; export from one process, which can "
            "load the checkpoint sharded over its own devices"
        )
    layer = None if spec.layer is None else np.int32(spec.layer)
    # The transpose runs on the devices: numpy would walk a strided copy on one core.
    return np.ascontiguousarray(_take(array, layer, dataclasses.replace(spec, name="", layer=None), dtype))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _take(
    array: Float[Array, "..."], layer: Int[Array | np.generic, ""] | None, layout: TensorSpec, dtype: DType
) -> Float[Array, "..."]:
    """One tensor in Hugging Face layout; `layout` is its spec without name and layer."""
    ours = array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)
    return layout.to_hf(ours).astype(dtype)
