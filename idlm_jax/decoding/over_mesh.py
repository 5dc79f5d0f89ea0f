"""What a mesh of devices does alike on every one of them: it looks at whole rows of logits, and draws from them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from idlm_jax.decoding.method import StepPlan
from idlm_jax.model.transformer import Qwen3
from idlm_jax.sharding import param_spec


def whole_logits(logits: Float[Array, "B W V"], plan: StepPlan) -> Float[Array, "B W V"]:
    """The logits on every device of a mesh, which has computed those of its part of the vocabulary.

    The simple way, for one gather a step: 4 B W V bytes, 136 MB for 32 windows of 7 rows of Qwen3, beside gigabytes of
    weights to read. All devices then do the same sums in the same order, so they draw the same tokens.
    """
    if plan.mesh is None:
        return logits
    # One axis of rows: of two, the TPU's compiler pads the shorter to 128 for this gather, and takes gigabytes.
    rows = logits.reshape(-1, logits.shape[-1])
    # Said in two steps: told only that the product is wanted whole, XLA gathers the head's weights instead.
    for spec in (param_spec("TV", rows.shape, plan.mesh), P()):
        rows = jax.lax.with_sharding_constraint(rows, NamedSharding(plan.mesh, spec))
    return rows.reshape(logits.shape)


def on_every_device(op: Callable[..., Any], module: Qwen3, plan: StepPlan, **options: Any) -> Callable[..., Any]:
    """`verify` or `draft` with what both are told alike; over a mesh, on every device alike."""
    kernels = module.config.kernels
    op = functools.partial(
        op,
        filtered=plan.filtered,
        excluded_id=plan.mask_token_id,
        all_greedy=plan.all_greedy,
        body=kernels.verify,
        interpret=kernels.interpret,
        **options,
    )
    if plan.mesh is None:
        return op

    def everywhere(*args: Any) -> Any:
        # A prefill has no drafts to verify, and an array without elements crashes the partitioner of jax 0.11.2 (a null
        # pointer in Shardy's ManualComputationUnusedInputsPattern): such an array is made inside.
        leaves, tree = jax.tree.flatten(args)

        def inside(*given: Array) -> Any:
            rest = iter(given)
            every = [next(rest) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
            return op(*jax.tree.unflatten(tree, every))

        mapped = jax.shard_map(inside, mesh=plan.mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return mapped(*(leaf for leaf in leaves if leaf.size))

    return everywhere
