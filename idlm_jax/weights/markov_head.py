"""The Markov head's file: `markov_head/model.safetensors` in the folder of the checkpoint or adapter it belongs to.

In a folder of its own, because servers load every safetensors file that lies beside a checkpoint's or an adapter's.
"""

from pathlib import Path

from jax.sharding import Mesh

from idlm_jax.config import DType, ModelConfig
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.model.markov_head import MARKOV_AXES, markov_shapes
from idlm_jax.weights.assemble import Params, read_params
from idlm_jax.weights.checkpoint import WeightsError, open_checkpoint
from idlm_jax.weights.hf_names import TensorSpec
from idlm_jax.weights.tensor_file import write_tensors

MARKOV_FOLDER = "markov_head"


def write_markov_head(lm: LanguageModel, folder: Path, dtype: DType | None) -> None:
    """Writes the head of `lm` into a checkpoint's or an adapter's folder; nothing where the model has none.

    Raises:
        OSError: the disk is full or not writable.
    """
    rank = lm.config.markov_rank
    if rank is not None:
        (folder / MARKOV_FOLDER).mkdir()
        file = folder / MARKOV_FOLDER / "model.safetensors"
        write_tensors(lm.params, _tensors(lm.config, rank), file, dtype or lm.config.param_dtype)


def read_markov_head(folder: Path, config: ModelConfig, mesh: Mesh | None) -> tuple[int | None, Params]:
    """Rank and parameters of the head in a checkpoint's or an adapter's folder; None and nothing where there is none.

    Raises:
        WeightsError: lists every missing, unexpected or mis-shaped tensor.
    """
    if not (folder / MARKOV_FOLDER).is_dir():
        return None, {}
    checkpoint = open_checkpoint(folder / MARKOV_FOLDER)
    if "columns" not in checkpoint.tensors:
        raise WeightsError(checkpoint.folder, [*checkpoint.problems, "missing: columns, of shape [vocabulary, rank]"])
    rank = checkpoint.tensors["columns"].shape[-1]
    specs = _tensors(config, rank)
    checkpoint.check(specs)
    return rank, read_params(checkpoint, specs, config, mesh)


def _tensors(config: ModelConfig, rank: int) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=path[-1], path=path, layer=None, axes=MARKOV_AXES[path], shape=shape, num_inputs=0)
        for path, shape in markov_shapes(config, rank).items()
    )
