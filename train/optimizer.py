"""AdamW with a linear warm-up and a cosine decay, global-norm clipping, and no decay on norm weights."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from train.config import TrainConfig


def learning_rate(config: TrainConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of one step: rises linearly to `config.learning_rate`, then falls along a half cosine to zero.

    rate = peak * (step + 1) / (warmup + 1) during the warm-up, so that the first step already moves. Every stage
    of a curriculum rises and falls anew, as the separate runs it stands for would; Adam's moments go on.

    Args:
        config: the run; the warm-up of a stage lasts `round(warmup_ratio * its steps)` steps.
        step: steps already taken, 0 at the first.
    """
    peak = config.learning_rate
    schedules = []
    for span in config.spans:
        length = span.stop - span.start
        warmup = round(config.warmup_ratio * length)
        schedules.append(
            optax.schedules.warmup_cosine_decay_schedule(
                init_value=peak / (warmup + 1), peak_value=peak, warmup_steps=warmup, decay_steps=length
            )
        )
    schedule = optax.schedules.join_schedules(schedules, [span.stop for span in config.spans[:-1]])
    # Optax mixes weak and strong dtypes in its schedules and in Adam's bias correction.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(schedule(step), jnp.float32)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clips the global gradient norm, then AdamW (decoupled weight decay) at the scheduled rate.

    Its state covers exactly the parameters given to `init`: the adapter alone in LoRA mode.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda step: learning_rate(config, jnp.asarray(step)),
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but the weights of norms.

    Told apart by name, not by rank: the norms of the stacked blocks are [L, D], as 2-D as any matrix.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not any("norm" in str(getattr(entry, "key", "")) for entry in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def update(
    optimizer: optax.GradientTransformation, grads: nnx.State, opt_state: optax.OptState, params: nnx.State
) -> tuple[nnx.State, optax.OptState]:
    """Applies one optimizer step; parameters and moments keep their dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return cast(nnx.State, optax.apply_updates(cast(Any, params), updates)), opt_state
