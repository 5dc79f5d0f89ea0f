"""Checkpoint folders for the tests of this folder, written by our own exporter or edited tensor by tensor."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file

from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights import export_hf
from tests.support.tiny_model import tiny_lm


def exported(folder: Path, **changes) -> Path:
    """A tiny model, exported in float32 as one file."""
    export_hf(tiny_lm(**changes), folder)
    return folder


def tensors_of(folder: Path, pattern: str = "*.safetensors") -> dict[str, np.ndarray]:
    """Every tensor in the folder, whatever its shard."""
    return {name: tensor for file in sorted(folder.glob(pattern)) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, changes: dict[str, np.ndarray | None], file: str = "model.safetensors") -> None:
    """Replaces, adds or (None) removes tensors of one file."""
    tensors = load_file(folder / file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / file)


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def cpu_mesh(**axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def assert_same_params(found: LanguageModel, wanted: LanguageModel) -> None:
    """Same paths, shapes, dtypes and bits."""
    found_flat, wanted_flat = (dict(nnx.to_flat_state(lm.params)) for lm in (found, wanted))
    assert found_flat.keys() == wanted_flat.keys()
    for path, variable in wanted_flat.items():
        a, b = np.asarray(found_flat[path][...]), np.asarray(variable[...])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.tobytes() == b.tobytes(), path
