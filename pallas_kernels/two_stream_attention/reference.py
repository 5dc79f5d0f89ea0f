"""Two-stream attention in plain jnp: clean rows against L keys, noisy rows against 2L, never [2L, 2L]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def two_stream_attention(
    q_noisy: Float[Array, "B L N H"],
    k_noisy: Float[Array, "B L K H"],
    v_noisy: Float[Array, "B L K H"],
    q_clean: Float[Array, "B L N H"],
    k_clean: Float[Array, "B L K H"],
    v_clean: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    block_start: Int[Array, "B L"],
) -> tuple[Float[Array, "B L N H"], Float[Array, "B L N H"]]:
    """The op as its contract states it; see the package for arguments and rules."""
    indices = {"segment_ids": segment_ids, "positions": positions}
    noisy = noisy_attention(q_noisy, k_noisy, v_noisy, k_clean, v_clean, block_start=block_start, **indices)
    return noisy, packed_causal_attention(q_clean, k_clean, v_clean, **indices)


def noisy_attention(
    q_noisy: Float[Array, "B L N H"],
    k_noisy: Float[Array, "B L K H"],
    v_noisy: Float[Array, "B L K H"],
    k_clean: Float[Array, "B L K H"],
    v_clean: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    block_start: Int[Array, "B L"],
) -> Float[Array, "B L N H"]:
    """The noisy stream alone."""
    # In all masks the second axis is the row that looks, the third the key that is seen.
    is_same_segment = _is_same_segment(segment_ids)
    is_past = is_same_segment & (positions[:, None, :] <= positions[:, :, None])
    is_before_block = is_same_segment & (positions[:, None, :] < block_start[:, :, None])
    is_in_block = is_past & (block_start[:, None, :] == block_start[:, :, None])
    return _attend(
        q_noisy,
        jnp.concatenate([k_clean, k_noisy], axis=1),
        jnp.concatenate([v_clean, v_noisy], axis=1),
        jnp.concatenate([is_before_block, is_in_block], axis=2),
    )


def packed_causal_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
) -> Float[Array, "B L N H"]:
    """The clean stream alone."""
    return _attend(q, k, v, _is_same_segment(segment_ids) & (positions[:, None, :] <= positions[:, :, None]))


def _is_same_segment(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    return (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    batch, rows, heads, head_dim = q.shape
    grouped = q.reshape(batch, rows, k.shape[2], heads // k.shape[2], head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    # The initial value keeps a row that sees nothing finite. The softmax does not depend on `top`, so its
    # gradient must not either.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probs = weights / jnp.where(total > 0, total, 1.0)
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return mixed.reshape(batch, rows, heads, head_dim).astype(v.dtype)
