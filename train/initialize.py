"""Where a run starts: a model, fresh or from a checkpoint, split into what is trained and what is frozen."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from idlm_jax.config import LoraConfig, ModelConfig
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.model.transformer import Qwen3
from idlm_jax.weights import load
from idlm_jax.weights.assemble import flat_variables
from pallas_kernels.bodies import choose_kernels
from train.config import FreshModel, TrainConfig
from train.mesh import state_sharding
from train.step import TrainState, init_state


@dataclasses.dataclass(frozen=True, eq=False)
class StartingPoint:
    """A model about to be trained.

    Attributes:
        graph: static half of the split module, adapter included.
        trainable: every parameter, or in LoRA mode the adapter's factors alone; always float32.
        frozen: the base parameters in LoRA mode, else empty.
        tokenizer: the dataset's tokenizer, exported with the model.
        hf_config: `config.json` of the checkpoint that training starts from; empty for a fresh model.
    """

    graph: nnx.GraphDef[Qwen3]
    trainable: nnx.State
    frozen: nnx.State
    tokenizer: PreTrainedTokenizerBase
    hf_config: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        return nnx.merge(self.graph, self.trainable, self.frozen).config

    def language_model(self, trainable: nnx.State, frozen: nnx.State) -> LanguageModel:
        """The model with other arrays, for evaluation and export."""
        graph, params = nnx.split(nnx.merge(self.graph, trainable, frozen))
        return LanguageModel(graph, params, self.tokenizer, self.hf_config)


def initialize(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, mesh: Mesh | None = None) -> StartingPoint:
    """Builds the model that a run starts from.

    Fresh parameters and adapter factors are drawn from `config.seed`; the same seed gives the same bits, on any mesh.
    With a mesh nothing is ever whole on one device.

    Raises:
        ValueError: the checkpoint's tokenizer is not the dataset's, no MASK id is known for the introspective
            objective, or the vocabulary is too small for the tokenizer.
    """
    if config.model is not None:
        loaded, hf_config = None, {}
        model_config = dataclasses.replace(
            _fresh_config(config.model, tokenizer), kernels=choose_kernels(config.kernels)
        )
    else:
        assert config.init_from is not None  # TrainConfig admits exactly one of the two
        loaded = load(
            config.init_from,
            dtype=config.param_dtype,
            mesh=mesh,
            mask_token_id=config.mask_token_id,
            kernels=config.kernels,
        )
        hf_config = dict(loaded.hf_config)
        model_config = loaded.config
        _check_same_tokenizer(config.init_from, loaded.tokenizer, tokenizer)
    mask = tokenizer.mask_token_id
    model_config = trained_config(config, model_config, mask if isinstance(mask, int) else None)
    kind = _trained_kind(config)

    def draw() -> Qwen3:
        return Qwen3(model_config, rngs=nnx.Rngs(config.seed))

    given, frozen = (nnx.State({}), nnx.State({})) if loaded is None else nnx.split_state(loaded.params, kind, ...)
    is_given = set(flat_variables(given))

    def draw_rest() -> nnx.State:
        # XLA drops what is not returned, so an adapter is drawn without drawing a base for it.
        drawn = flat_variables(nnx.state(draw(), kind))
        rest = [(path, x.astype(jnp.float32)) for path, x in drawn.items() if path not in is_given]
        return nnx.from_flat_state(rest)

    sharding = None if mesh is None else state_sharding(jax.eval_shape(draw_rest), mesh)
    graph, _, _ = nnx.split(nnx.eval_shape(draw), kind, ...)
    given = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    trainable = nnx.merge_state(given, jax.jit(draw_rest, out_shardings=sharding)())
    return StartingPoint(graph, trainable, frozen, tokenizer, hf_config)


def trained_config(config: TrainConfig, base: ModelConfig, mask_token_id: int | None = None) -> ModelConfig:
    """What is trained from `base`: the run's MASK id (else the base's, else the given one), dtypes, remat, adapter.

    Raises:
        ValueError: no MASK id is known and the objective needs one, or the checkpoint's Markov head has another rank.
    """
    known = (config.mask_token_id, base.mask_token_id, mask_token_id)
    mask_token_id = next((each for each in known if each is not None), None)
    if mask_token_id is None and config.objective != "ar":
        raise ValueError(
            "no MASK id: give mask_token_id, a checkpoint that names one, or a tokenizer with a mask token"
        )
    if config.markov_rank and base.markov_rank and config.markov_rank != base.markov_rank:
        raise ValueError(f"markov_rank={config.markov_rank}, but the head in init_from has rank {base.markov_rank}")
    return dataclasses.replace(
        base,
        mask_token_id=mask_token_id,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        markov_rank=config.markov_rank or base.markov_rank,
        lora=LoraConfig(rank=config.lora.rank, alpha=config.lora.alpha) if config.lora else None,
    )


def abstract_start(config: TrainConfig, model: ModelConfig) -> tuple[nnx.GraphDef[Qwen3], TrainState]:
    """The static half of a run's model and the shapes of its first state: no array is made."""
    graph, trainable, frozen = nnx.split(
        nnx.eval_shape(lambda: Qwen3(model, rngs=nnx.Rngs(0))), _trained_kind(config), ...
    )
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
    return graph, jax.eval_shape(functools.partial(init_state, config), trainable, frozen)


def _trained_kind(config: TrainConfig) -> type[nnx.Param]:
    return nnx.LoRAParam if config.lora else nnx.Param


def _fresh_config(model: FreshModel, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    if model.vocab_size < len(tokenizer):
        raise ValueError(f"{model.vocab_size=} is smaller than the tokenizer's {len(tokenizer)} tokens")
    eos = tokenizer.eos_token_id
    return ModelConfig(**dataclasses.asdict(model), eos_token_ids=(eos,) if isinstance(eos, int) else ())


def _check_same_tokenizer(
    folder: str, of_model: PreTrainedTokenizerBase | None, of_dataset: PreTrainedTokenizerBase
) -> None:
    if of_model is None:
        return
    ours, theirs = of_model.get_vocab(), of_dataset.get_vocab()
    different = {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}
    # The MASK token may have been added on one side only: it never occurs in text.
    if different - {str(of_model.mask_token), str(of_dataset.mask_token)}:
        raise ValueError(
            f"init_from={folder!r} and the dataset use different tokenizers ({len(different)} tokens differ, "
            f"{sorted(different)[0]!r} among them): rebuild the dataset with the checkpoint's tokenizer"
        )
