"""Reductions over a vocabulary that may be cut over a mesh axis: shared by the ops that end in a product with it.

`axis` is None for a whole vocabulary; else these functions run inside `jax.shard_map`, where every device of the axis
holds the same rows and an equal, consecutive part of the vocabulary, in order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def first_id(num_ids: int, axis: str | None) -> Int[Array, ""] | int:
    """Token id of this device's first column, of `num_ids` on each device."""
    return 0 if axis is None else jax.lax.axis_index(axis) * num_ids


def total_ids(num_ids: int, axis: str | None) -> int:
    """Size of the whole vocabulary."""
    return num_ids if axis is None else num_ids * jax.lax.axis_size(axis)


def total(parts: Array, axis: str | None) -> Array:
    """The sum of what the devices hold."""
    return parts if axis is None else jax.lax.psum(parts, axis)


def log_sum_exp(logits: Float[Array, "I V"], axis: str | None) -> Float[Array, " I"]:
    """Over the whole vocabulary, from this device's columns."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    if axis is None:
        return lse
    top = jax.lax.pmax(lse, axis)
    return top + jnp.log(jax.lax.psum(jnp.exp(lse - top), axis))


def log_softmax(logits: Float[Array, "I V"], axis: str | None) -> Float[Array, "I V"]:
    """This device's columns of the logarithm of the softmax over the whole vocabulary."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    if axis is not None:
        top = jax.lax.pmax(top, axis)
    # Not `logits - log_sum_exp`: of large logits, that difference has lost the digits that probabilities need.
    shifted = logits - top
    return shifted - jnp.log(total(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True), axis))


def equal_trips(num_tiles: Int[Array, ""], axis: str | None) -> Int[Array, ""]:
    """A trip count that all devices of the mesh share: a loop with collectives must be run in step.

    Devices with fewer rows go over empty tiles, while they would wait for the gradient's sum anyway.
    """
    return num_tiles if axis is None else jax.lax.pmax(num_tiles, jax.sharding.get_abstract_mesh().axis_names)
