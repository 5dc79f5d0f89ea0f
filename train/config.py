"""What a run is: frozen dataclasses filled from one YAML file plus `key=value` overrides, mistakes named.

OmegaConf reads (it takes 1e-5 for a number, which PyYAML does not), pydantic checks types and ranges, and an
unknown key is answered with the nearest valid one. `python -m train --help` is generated from this file.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from train.config_help import describe
from train.curriculum import Span, Stage, check_shares, cut_steps
from train.dataset_config import Dataset

# The official code's names for two keys; accepted on the way in, never written out.
ALIASES = {"ce_alpha": "clean_loss_weight", "loss_auto_balance": "auto_balance"}

Count = Annotated[int, Field(ge=1)]
_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


class ConfigError(ValueError):
    """The file or an override is wrong; the message names the key, what was given and what is allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshModel:
    """Shape of a Qwen3 that starts from random parameters; read only when `init_from` is null."""

    __pydantic_config__ = _STRICT

    vocab_size: Annotated[int, Field(ge=1, description="rows of the embedding; at least the tokenizer's")]
    hidden_size: Annotated[int, Field(ge=1, description="model width")]
    num_layers: Annotated[int, Field(ge=1, description="decoder blocks")]
    num_heads: Annotated[int, Field(ge=1, description="query heads")]
    num_kv_heads: Annotated[int, Field(ge=1, description="key/value heads; divides num_heads")]
    head_dim: Annotated[int, Field(ge=2, description="width of one head; even")]
    mlp_size: Annotated[int, Field(ge=1, description="width of the gated MLP")]
    tie_embeddings: Annotated[bool, Field(description="the output head is the embedding")] = True
    rope_theta: Annotated[float, Field(gt=0, description="base of the rotary frequencies")] = 1_000_000.0
    max_position: Annotated[int, Field(ge=1, description="longest sequence the exported config claims")] = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A gated adapter (R-ISD): the base is frozen, and the adapter acts on MASK rows only."""

    __pydantic_config__ = _STRICT

    rank: Annotated[int, Field(ge=1, description="inner width of the two factors")] = 128
    alpha: Annotated[float, Field(gt=0, description="scale numerator; the update is alpha / rank * (x A) B")] = 128.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices per axis; one may be -1 and takes the rest."""

    __pydantic_config__ = _STRICT

    data: Annotated[int, Field(ge=-1, description="copies of the model; each takes a share of the batch")] = 1
    fsdp: Annotated[int, Field(ge=-1, description="as data, with parameters and optimizer cut over it")] = 1
    context: Annotated[int, Field(ge=-1, description="each sequence cut over it, for long rows; parameters too")] = 1
    tensor: Annotated[int, Field(ge=-1, description="heads, MLP and vocabulary cut over it")] = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(f"{self}: sizes are positive, and at most one is -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. `<output_dir>/<run_name>` is its folder; the same command run again resumes there."""

    __pydantic_config__ = _STRICT

    run_name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$", description="name of the run's folder")]
    output_dir: Annotated[str, Field(description="parent of all run folders")] = "runs"
    objective: Annotated[
        Literal["ar", "introspective", "block_diffusion"],
        Field(
            description="ar: next token; introspective: CE_noisy (+ KL, TV) + clean_loss_weight * CE_clean; "
            "block_diffusion: MASKs of a block from all of it and the blocks before, to compare with"
        ),
    ] = "introspective"
    init_from: Annotated[str | None, Field(description="Hugging Face folder or hub id to start from")] = None
    model: Annotated[FreshModel | None, Field(description="or the shape of a model that starts random")] = None
    lora: Annotated[Lora | None, Field(description="train a gated adapter; null trains every parameter")] = None
    markov_rank: Annotated[
        int | None,
        Field(
            ge=1,
            le=256,
            description="train a head of this rank that corrects each MASK by the token before; null: the checkpoint's",
        ),
    ] = None
    dataset: Annotated[Dataset, Field(description="packed rows")]

    block_length: Annotated[
        int,
        Field(
            ge=1,
            le=15,
            description="MASKs per block: the largest stride that will run, minus one; block_diffusion: tokens",
        ),
    ] = 3
    mask_token_id: Annotated[
        int | None,
        Field(ge=0, description="id fed at MASK positions; null: the checkpoint's or tokenizer's own"),
    ] = None
    clean_loss_weight: Annotated[float, Field(ge=0, description="alpha; also ce_alpha")] = 0.2
    auto_balance: Annotated[
        bool, Field(description="alpha = stop_gradient(CE_noisy / CE_clean) instead; also loss_auto_balance")
    ] = False
    label_rows: Annotated[
        Literal["mask_rows", "official", "automodel"], Field(description="which noisy rows carry a label")
    ] = "mask_rows"
    random_block_phase: Annotated[
        bool,
        Field(
            description="shift each document's block grid at random: every token at every depth; "
            "block_diffusion: noise anew each time"
        ),
    ] = False
    predicts_next: Annotated[
        bool, Field(description="block_diffusion: row i predicts token i + 1, as in the AR model, instead of token i")
    ] = False

    kl_weight: Annotated[
        float,
        Field(ge=0, description="of KL(p || q) in the noisy loss: the clean stream teaches the noisy one"),
    ] = 0.0
    tv_weight: Annotated[
        float,
        Field(ge=0, description="of the total variation of p and q, likewise: 1 - expected acceptance"),
    ] = 0.0
    depth_weights: Annotated[
        tuple[float, ...],
        Field(description="factors on the noisy loss of the 1st, 2nd, ... MASK of a block; empty: all 1"),
    ] = ()
    curriculum: Annotated[
        tuple[Stage, ...],
        Field(description="stages of the run, each with its own warm-up and decay; empty: one stage"),
    ] = ()

    mesh: Annotated[
        MeshShape, Field(description="devices per axis; all 1: the first device; mesh.fsdp=-1: all devices")
    ] = MeshShape()
    steps: Annotated[int, Field(ge=1, description="optimizer steps of the whole run")]
    batch_size: Annotated[int, Field(ge=1, description="packed rows per optimizer step, over all devices")]
    gradient_accumulation_steps: Annotated[
        int, Field(ge=1, description="parts a batch is cut into, to save memory; divides batch_size")
    ] = 1
    learning_rate: Annotated[float, Field(gt=0, description="peak")] = 1e-5
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="share of steps with a rising rate")] = 0.03
    clip_norm: Annotated[float, Field(gt=0, description="largest global gradient norm")] = 1.0
    weight_decay: Annotated[float, Field(ge=0, description="AdamW; norm weights are left out")] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1, description="decay of the first moment")] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the second moment")] = 0.95
    adam_epsilon: Annotated[float, Field(gt=0, description="added to the denominator")] = 1e-8

    save_every: Annotated[int, Field(ge=1, description="steps between checkpoints; the last step always saves")] = 500
    keep: Annotated[int, Field(ge=1, description="newest checkpoints kept")] = 2
    keep_best: Annotated[
        bool,
        Field(description="also keep the step of the best held-out acceptance (ar: loss); --export-only --step best"),
    ] = False
    eval_every: Annotated[int, Field(ge=0, description="steps between evaluations; 0: only after the last")] = 500
    eval_batches: Annotated[int, Field(ge=0, description="held-out batches of one evaluation; 0: none")] = 8
    eval_samples: Annotated[
        int, Field(ge=0, description="held-out prompts completed at each evaluation, shown and kept in samples.jsonl")
    ] = 0
    log_every: Annotated[int, Field(ge=1, description="steps between two lines of metrics")] = 10
    spike_ratio: Annotated[
        float | None,
        Field(gt=1, description="stop at a loss over this many times the recent median, its batch saved; null: never"),
    ] = None
    profile_start: Annotated[int, Field(ge=1, description="first step that the profiler records")] = 10
    profile_steps: Annotated[
        int, Field(ge=0, description="steps that it records, into profile/ for TensorBoard or Perfetto; 0: none")
    ] = 0
    wandb_project: Annotated[
        str | None, Field(description="send metrics to this Weights & Biases project, where wandb is installed")
    ] = None

    param_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="of the frozen base under lora; trained parameters are always float32"),
    ] = "float32"
    compute_dtype: Annotated[Literal["float32", "bfloat16"], Field(description="of matrix products")] = "float32"
    remat: Annotated[
        Literal["none", "full", "dots"],
        Field(description="recomputed in the backward pass: less memory, more time"),
    ] = "none"
    offload_optimizer: Annotated[
        bool, Field(description="keep Adam's moments in the host's memory: less of the device's, slower steps")
    ] = False
    kernels: Annotated[
        Literal["auto", "reference", "triton", "tpu", "jax_triton"],
        Field(description="implementation of the attention ops; auto: what is fastest on the device"),
    ] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31, description="initial parameters, order of rows, block phases")] = 0

    def __post_init__(self) -> None:
        if (self.init_from is None) == (self.model is None):
            raise ValueError("give exactly one of init_from (a checkpoint) and model (the shape of a fresh one)")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        if self.lora and self.objective == "ar":
            raise ValueError("lora needs objective=introspective: the adapter acts on MASK rows, and ar has none")
        if self.lora and self.init_from is None:
            raise ValueError("lora needs init_from: an adapter is of no use without its base checkpoint")
        if self.markov_rank and self.objective != "introspective":
            raise ValueError("markov_rank needs objective=introspective: the head corrects what its MASK rows draft")
        if self.param_dtype == "bfloat16" and not self.lora:
            raise ValueError(
                "param_dtype=bfloat16 without lora would round away small updates; keep float32 parameters "
                "and set compute_dtype=bfloat16"
            )
        self._check_block_diffusion()
        self._check_curriculum()
        self._check_weights()

    def _check_block_diffusion(self) -> None:
        if self.objective != "block_diffusion":
            if self.predicts_next:
                raise ValueError("predicts_next needs objective=block_diffusion: the others always predict the next")
            return
        if self.lora or self.curriculum or self.mesh.context != 1:
            raise ValueError("objective=block_diffusion trains every parameter, in one stage, with mesh.context=1")
        if not self.random_block_phase:
            raise ValueError("objective=block_diffusion needs random_block_phase: true, which seeds its noise")

    def _check_weights(self) -> None:
        extra = [self.kl_weight, self.tv_weight, *self.depth_weights]
        extra += [weight for stage in self.curriculum for weight in (stage.kl_weight, stage.tv_weight)]
        if self.objective != "introspective" and any(extra):
            raise ValueError("kl_weight, tv_weight and depth_weights need objective=introspective")
        if any(weight < 0 for weight in self.depth_weights):
            raise ValueError(f"depth_weights={list(self.depth_weights)} must not be negative")
        if self.depth_weights and len(self.depth_weights) != self.block_length:
            raise ValueError(
                f"depth_weights={list(self.depth_weights)} needs one weight per MASK of a block: "
                f"block_length={self.block_length}"
            )
        if any(span.depth_weights and not any(span.depth_weights) for span in self.spans):
            raise ValueError(f"depth_weights={list(self.depth_weights)} leaves a whole block without weight")

    def _check_curriculum(self) -> None:
        if not self.curriculum:
            return
        if self.objective == "ar":
            raise ValueError("curriculum needs objective=introspective: ar has no blocks")
        lengths = [stage.block_length for stage in self.curriculum]
        if lengths[-1] != self.block_length or max(lengths) != self.block_length:
            raise ValueError(
                f"curriculum has block lengths {lengths}: none may exceed the run's block_length="
                f"{self.block_length}, and the last must equal it, for that is what evaluation measures"
            )
        check_shares(self.curriculum)
        empty = [span.number for span in self.spans if span.start == span.stop]
        if empty:
            raise ValueError(f"curriculum: stage {empty[0]} has no step: steps={self.steps} are too few for its share")

    @property
    def spans(self) -> tuple[Span, ...]:
        """The stages in order, nothing left open; a run without a curriculum has one."""
        stages = self.curriculum or (Stage(block_length=self.block_length),)
        stops = cut_steps(stages, self.steps)
        return tuple(
            Span(
                number=number,
                start=start,
                stop=stop,
                block_length=stage.block_length,
                auto_balance=self.auto_balance if stage.auto_balance is None else stage.auto_balance,
                kl_weight=self.kl_weight if stage.kl_weight is None else stage.kl_weight,
                tv_weight=self.tv_weight if stage.tv_weight is None else stage.tv_weight,
                depth_weights=self.depth_weights[: stage.block_length],
            )
            for number, (stage, start, stop) in enumerate(zip(stages, (0, *stops), stops, strict=False), 1)
        )

    def span_of(self, step: int) -> Span:
        """The stage that trains when `step` steps have been taken: a function of the step alone."""
        return next(span for span in self.spans if step < span.stop)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run_name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies `key=value` or `key.sub=value` overrides, the last one winning.

    Raises:
        ConfigError: the file is absent or unreadable, an override has no "=", or a key or value is wrong.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"{path}: expected `key: value` lines, found a list")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    assert isinstance(values, dict)  # merging a dict gives a dict
    return config_from_mapping({str(key): value for key, value in values.items()})


def config_from_mapping(values: Mapping[str, Any]) -> TrainConfig:
    """Builds a validated config from plain nested values.

    Raises:
        ConfigError: every unknown key (with the nearest valid name), wrong type and wrong value, a line each.
    """
    values = dict(values)
    for alias, name in ALIASES.items():
        if alias in values:
            if name in values:
                raise ConfigError(f"{alias} is another name of {name}: give only one of them")
            values[name] = values.pop(alias)
    try:
        return pydantic.TypeAdapter(TrainConfig).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def to_yaml(config: TrainConfig) -> str:
    """The resolved config; `load_config` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(pydantic.TypeAdapter(TrainConfig).dump_python(config, mode="json")))


def describe_keys() -> Iterator[tuple[str, str, str, str]]:
    """Every key as (dotted name, type, default or "required", help), in the order of this file."""
    yield from describe(TrainConfig)


def _explain(error: Any) -> str:
    """One pydantic error as a line for people."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [key for key, *_ in describe_keys()]
        near = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=0.5)
        return f"unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help for all keys")
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{name}: required, and not given"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return message
    return f"{name}={error['input']!r}: {message[0].lower()}{message[1:]}"
