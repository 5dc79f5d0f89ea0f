"""Whole training steps on random weights: milliseconds, tokens/s, MFU and memory of what `python -m train` runs."""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.compiling import Compiler, describe
from idlm_jax.config import ModelConfig
from idlm_jax.qwen3_sizes import QWEN3_SIZES
from pallas_kernels.bodies import choose_kernels
from train.batch import Batch
from train.config import TrainConfig, config_from_mapping
from train.flops import Work, step_flops
from train.initialize import abstract_start, trained_config
from train.step import TrainState, make_train_step
from train.targets import find_device

WARM_UP, SAMPLES = 2, 8
# Compiling a step of 36 layers and drawing its weights, on a slow day.
NEEDS_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCase:
    """A model, a batch and a config; full rows, one document each, every token supervised.

    Attributes:
        name: for `--shapes`.
        size: released model.
        layers: of it, so many; None for all.
        rows: of the batch.
        row_len: tokens of a row.
        changes: keys of the run's config.
    """

    name: str
    size: str
    layers: int | None = None
    rows: int = 4
    row_len: int = 4096
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self) -> TrainConfig:
        values = {
            "run_name": "device",
            "init_from": self.size,
            "dataset": {"path": "none"},
            "steps": 1000,
            "batch_size": self.rows,
            "learning_rate": 1e-5,
            "compute_dtype": "bfloat16",
            "remat": "full",
        }
        return config_from_mapping(values | self.changes)

    def model(self, config: TrainConfig, platform: str) -> ModelConfig:
        size = TINY if self.size == "tiny" else QWEN3_SIZES[self.size]
        kernels = choose_kernels(config.kernels, platform=platform)
        size = dataclasses.replace(size, kernels=kernels, num_layers=self.layers or size.num_layers)
        return trained_config(config, size)


TINY = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_size=64,
    mask_token_id=127,
)
LORA = {"lora": {"rank": 128, "alpha": 256}, "param_dtype": "bfloat16"}
AR = {"objective": "ar"}
DRY = (
    StepCase(name="tiny", size="tiny", rows=2, row_len=32, changes={"compute_dtype": "float32"}),
    StepCase(name="tiny_ar", size="tiny", rows=2, row_len=32, changes=AR | {"compute_dtype": "float32"}),
)
# The most telling first. 24 layers of 8B take 16 bytes a parameter, moments and gradients included: 95 GB.
CASES = (
    StepCase(name="qwen3_8b_lora", size="Qwen3-8B", rows=2, changes=LORA),
    StepCase(name="qwen3_8b_24_layers", size="Qwen3-8B", layers=24, rows=2),
    StepCase(name="qwen3_8b_24_layers_ar", size="Qwen3-8B", layers=24, rows=2, changes=AR),
    StepCase(name="qwen3_0p6b", size="Qwen3-0.6B"),
    StepCase(name="qwen3_0p6b_dots", size="Qwen3-0.6B", changes={"remat": "dots"}),
    StepCase(name="qwen3_1p7b", size="Qwen3-1.7B"),
    StepCase(name="qwen3_1p7b_kl", size="Qwen3-1.7B", changes={"kl_weight": 1.0}),
    StepCase(name="qwen3_0p6b_reference", size="Qwen3-0.6B", rows=1, changes={"kernels": "reference"}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """What one case did.

    Attributes:
        case: its name.
        num_params: of the model.
        median_ms: of a step; None where it was not timed.
        iqr_ms: distance between the quartiles.
        tokens_per_s: data tokens.
        mfu: share of the device's published bfloat16 peak, by `train.flops`; None where that is unknown.
        peak_bytes: parameters, moments and temporaries, by the compiler.
        loss: of the last step; random weights and tokens: near log(vocabulary) twice, and finite.
        note: why there is no figure.
    """

    case: str
    num_params: int = 0
    median_ms: float | None = None
    iqr_ms: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    note: str = ""


def time_steps(
    cases: Sequence[StepCase], compiler: Compiler, budget: Budget, platform: str, *, is_dry: bool
) -> list[StepSpeed]:
    """Compiles all at once, then times one after the other: two steps of these sizes do not fit a device together.

    A dry run does the same and keeps no figure.
    """
    begun = []
    for case in cases:
        config = case.config()
        graph, state = abstract_start(config, case.model(config, platform))
        batch = jax.eval_shape(lambda case=case: make_batch(case, vocab_size=2))
        begun.append((case, state, compiler.submit(make_train_step(graph, config), state, batch, donate=True)))
    results = []
    for case, state, future in begun:
        if not budget.allows(NEEDS_S):
            results.append(StepSpeed(case=case.name, note=SKIPPED))
            continue
        try:
            speed = _time(case, state, future.result(timeout=budget.left_s), platform)
            if is_dry:
                speed = dataclasses.replace(speed, median_ms=None, iqr_ms=None, tokens_per_s=None, note="dry")
            results.append(speed)
        except Exception as error:  # out of memory, a kernel's refusal: the next case may still run
            results.append(StepSpeed(case=case.name, note=describe(error)))
    return results


def make_batch(case: StepCase, vocab_size: int) -> Batch:
    """Full rows of random tokens."""
    shape = (case.rows, case.row_len)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(case.row_len, dtype=jnp.int32), shape)
    ones = jnp.ones(shape, jnp.int32)
    return Batch(tokens, ones, positions, ones != 0, 0 * ones)


def make_state(like: TrainState) -> TrainState:
    """Small random weights, drawn on the device leaf by leaf; moments are zero."""

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    return like._replace(
        step=jnp.int32(0), params=_draw(like.params), frozen=_draw(like.frozen), opt_state=zeros(like.opt_state)
    )


def _draw(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    drawn = []
    for number, leaf in enumerate(leaves):
        draw = jax.jit(
            lambda key, leaf=leaf: (0.02 * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)
        )
        drawn.append(draw(jax.random.key(number)))
    return jax.tree.unflatten(structure, drawn)


def _time(case: StepCase, like: TrainState, compiled: Compiled, platform: str) -> StepSpeed:
    config = case.config()
    model = case.model(config, platform)
    state, batch = make_state(like), make_batch(case, model.vocab_size - 300)
    seconds: list[float] = []
    metrics: dict[str, Any] = {}
    for _ in range(WARM_UP + SAMPLES):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    seconds, loss = seconds[WARM_UP:], float(metrics["loss"])
    median = statistics.median(seconds)
    memory: Any = compiled.memory_analysis()
    tokens = case.rows * case.row_len
    work = Work(tokens, float(metrics["supervised_tokens"]), float(metrics["clean_rows"]), float(metrics["attended"]))
    flops = step_flops(model, work, is_ar=config.objective == "ar", has_divergence=config.spans[-1].has_divergence)
    device = find_device(jax.devices()[0].device_kind)
    quartiles = statistics.quantiles(seconds, n=4)
    return StepSpeed(
        case=case.name,
        num_params=model.num_params,
        median_ms=median * 1e3,
        iqr_ms=(quartiles[2] - quartiles[0]) * 1e3,
        tokens_per_s=tokens / median,
        mfu=device and flops / median / device.flops,
        peak_bytes=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        loss=loss,
        note="" if math.isfinite(loss) else "the loss is not finite",
    )
