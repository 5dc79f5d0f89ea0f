"""One optimizer step as one compiled function, and the state it carries."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from idlm_jax.model.transformer import Qwen3
from train import block_diffusion
from train.batch import Batch
from train.config import TrainConfig
from train.curriculum import Span
from train.layout import LabelRows, ObjectiveSettings, RowCounts, lay_out
from train.objective import ar_loss, introspective_loss, measure_acceptance
from train.optimizer import learning_rate, make_optimizer, update
from train.row_means import Metrics

LossFn = Callable[[Qwen3, Batch, RowCounts], tuple[Float[Array, ""], Metrics]]
StepMetrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything a step reads and writes.

    Attributes:
        step: optimizer steps taken; int32.
        params: what is trained, float32.
        frozen: base parameters in LoRA mode, else empty; never changed and not checkpointed.
        opt_state: Optax state, of `params` alone.
    """

    step: Int[Array, ""]
    params: nnx.State
    frozen: nnx.State
    opt_state: optax.OptState


def init_state(config: TrainConfig, params: nnx.State, frozen: nnx.State) -> TrainState:
    """The state before the first step; takes over `params` and `frozen`, which the first step donates."""
    return TrainState(jnp.int32(0), params, frozen, make_optimizer(config).init(params))


def objective_settings(config: TrainConfig, span: Span) -> ObjectiveSettings:
    """The part of a run's config that the objective reads, in one of the run's stages."""
    return ObjectiveSettings(
        block_length=span.block_length,
        clean_weight=config.clean_loss_weight,
        auto_balance=span.auto_balance,
        label_rows=LabelRows(config.label_rows),
        kl_weight=span.kl_weight,
        tv_weight=span.tv_weight,
        depth_weights=span.depth_weights,
    )


def make_train_step(
    graph: nnx.GraphDef[Qwen3], config: TrainConfig, span: Span | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds the step of a run, or of one stage of its curriculum, to be jitted with its state donated.

    A batch is cut into `gradient_accumulation_steps` parts of every n-th row, one after the other. Their
    losses use the scored rows of the *whole* batch as denominators, so gradients and metrics are those of
    the uncut batch whatever the parts hold. The one exception is `auto_balance`: its alpha is each part's own
    ratio, and `alpha` reports their mean. The batch's ratio is known only after the forwards of all parts, so
    it would take every one of them a second forward, or two gradients kept apart; the official code takes the
    ratio of each part, too.

    Args:
        graph: static half of the model, compiled in.
        config: the run.
        span: the stage; None: the last, which is the only one without a curriculum.

    Returns:
        `step(state, batch) -> (state, metrics)`. Metrics are float32 scalars: `loss`, the objective's
        terms, `lr`, `grad_norm` (before clipping), `tokens` (padding excluded), `supervised_tokens` (rows
        with a label in the stream being trained), `clean_rows` (those of the clean stream), `attended` (pairs of
        a row and a key it sees, over both streams) and with a curriculum `stage`, 1 for the first.
    """
    span = span or config.spans[-1]
    settings, stage = objective_settings(config, span), {"stage": jnp.float32(span.number)}
    optimizer, (loss_fn, count) = make_optimizer(config), _loss_fn(config, settings)
    parts = config.gradient_accumulation_steps

    def loss_of(
        params: nnx.State, frozen: nnx.State, batch: Batch, counts: RowCounts
    ) -> tuple[Float[Array, ""], Metrics]:
        return loss_fn(nnx.merge(graph, params, frozen), batch, counts)

    grad_fn = jax.value_and_grad(loss_of, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        counts = count(batch)

        def grads_of(part: Batch) -> tuple[tuple[Float[Array, ""], Metrics], nnx.State]:
            return grad_fn(state.params, state.frozen, part, counts)

        if parts == 1:
            (loss, terms), grads = grads_of(batch)
        else:
            cut = jax.tree.map(lambda x: _every_nth_row(x, parts), batch)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grads_of, _part(cut, 0)))
            ((loss, terms), grads), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, grads_of(part)), None), zeros, cut
            )
        moments = state.opt_state
        if config.offload_optimizer:
            moments = jax.device_put(moments, jax.memory.Space.Device)
        params, opt_state = update(optimizer, grads, moments, state.params)
        with jax.numpy_dtype_promotion("standard"):
            grad_norm = optax.tree.norm(grads)
        trained_rows = counts.clean if config.objective == "ar" else counts.noisy
        metrics = {
            "loss": loss,
            **{name: term.mean for name, term in terms.items()},
            "lr": learning_rate(config, state.step),
            "grad_norm": grad_norm,
            "tokens": jnp.sum(batch.segment_ids != 0).astype(jnp.float32),
            "supervised_tokens": trained_rows,
            "clean_rows": counts.clean,
            "attended": _attended_pairs(batch),
            **(stage if config.curriculum else {}),
        }
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return step


def make_eval_step(graph: nnx.GraphDef[Qwen3], config: TrainConfig) -> Callable[[nnx.State, nnx.State, Batch], Metrics]:
    """Builds the jitted measurement of a held-out batch: loss terms, and acceptance where there is one.

    The result of several batches adds up field by field, to means over all their rows. A curriculum's last
    stage is what is measured from the start: one yardstick for the whole run.
    """
    settings = objective_settings(config, config.spans[-1])
    loss_fn, count = _loss_fn(config, settings)

    @jax.jit
    def evaluate(params: nnx.State, frozen: nnx.State, batch: Batch) -> Metrics:
        module = nnx.merge(graph, params, frozen)
        _, terms = loss_fn(module, batch, count(batch))
        if config.objective == "ar":
            return terms
        if config.objective == "block_diffusion":
            how = {"predicts_next": config.predicts_next}
            return block_diffusion.measure_agreement(module, batch, config.block_length, **how) | terms
        # Both name their cross-entropies alike; those of the loss count the rows that are trained.
        return measure_acceptance(module, batch, settings) | terms

    return evaluate


def _attended_pairs(batch: Batch) -> Float[Array, ""]:
    # A clean row sees all rows up to its own, the noisy row beside it as many.
    seen = jnp.where(jnp.asarray(batch.segment_ids) != 0, jnp.asarray(batch.positions) + 1, 0)
    return 2 * jnp.sum(seen.astype(jnp.float32))


def _loss_fn(config: TrainConfig, settings: ObjectiveSettings) -> tuple[LossFn, Callable[[Batch], RowCounts]]:
    """The loss of a run, and what counts its denominators."""
    if config.objective == "block_diffusion":
        how = {"block_length": config.block_length, "predicts_next": config.predicts_next}
        return (
            lambda module, batch, counts: block_diffusion.block_diffusion_loss(module, batch, row_counts=counts, **how),
            functools.partial(block_diffusion.count_rows, **how),
        )

    def count(batch: Batch) -> RowCounts:
        return lay_out(batch, settings).count_rows()

    if config.objective == "ar":
        return ar_loss, count
    return lambda module, batch, counts: introspective_loss(module, batch, settings, counts), count


def _every_nth_row(x: Shaped[Array, "B L"], parts: int) -> Shaped[Array, "P rows L"]:
    # Strided, not contiguous: each part then has its share of rows on every device that holds some of a
    # batch.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, x.shape[1]), 0, 1)


def _part(cut: Batch, index: int) -> Batch:
    return jax.tree.map(lambda x: x[index], cut)
