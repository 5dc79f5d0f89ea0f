"""Training attention over a noisy and a clean stream of the same packed documents: the contract of the op."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.two_stream_attention import reference


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
    """Attends within each stream and from the noisy stream to the clean one; never from clean to noisy.

    out = softmax(q k^T / sqrt(H)) v over the keys a row sees, all of its own non-zero segment:

    - clean row i sees clean key j where `positions[j] <= positions[i]`;
    - noisy row i sees clean key j where `positions[j] < block_start[i]`;
    - noisy row i sees noisy key j where `block_start[j] == block_start[i]`, `positions[j] <= positions[i]`.

    Scores, softmax and accumulation are float32.

    Args:
        q_noisy: rotated queries of the noisy stream; query head n reads key head n // (N / K).
        k_noisy: rotated keys of the noisy stream.
        v_noisy: values of the noisy stream.
        q_clean: rotated queries of the clean stream.
        k_clean: rotated keys of the clean stream.
        v_clean: values of the clean stream.
        segment_ids: document of each row; 0 is padding, which sees nothing and is seen by nothing.
        positions: position of each row inside its document; any value in padding.
        block_start: position at which the row's block starts, 0 or less for the first block; any value in
            padding.

    Returns:
        The noisy and the clean rows, in the dtype of the values; a row that sees nothing is 0, and so are its
        gradients.

    Raises:
        ValueError: shapes disagree, or N is no multiple of K.
        TypeError: the six streams do not share one floating dtype, or an index array is not of integers.

    Source: I-DLM (arXiv 2604.11035), training on the concatenation [x_t | x_0]. differs: block starts are
    data, not multiples of one block length, so every document can shift its own block grid.
    """
    batch, length, heads, head_dim = q_clean.shape
    kv_heads = k_clean.shape[2]
    streams = {"q_noisy": q_noisy, "k_noisy": k_noisy, "v_noisy": v_noisy}
    streams |= {"q_clean": q_clean, "k_clean": k_clean, "v_clean": v_clean}
    for name, stream in streams.items():
        expected = (batch, length, heads if name.startswith("q") else kv_heads, head_dim)
        if stream.shape != expected:
            raise ValueError(f"{name}.shape={stream.shape}, but q_clean and k_clean imply {expected}")
        if stream.dtype != q_clean.dtype or not jnp.issubdtype(stream.dtype, jnp.floating):
            raise TypeError(f"{name}.dtype={stream.dtype}, but all streams need one floating dtype, {q_clean.dtype=}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    indices = {"segment_ids": segment_ids, "positions": positions, "block_start": block_start}
    for name, index in indices.items():
        if index.shape != (batch, length):
            raise ValueError(f"{name}.shape={index.shape}, but q_clean implies {(batch, length)}")
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(f"{name}.dtype={index.dtype} is not an integer dtype")
    return reference.two_stream_attention(
        q_noisy,
        k_noisy,
        v_noisy,
        q_clean,
        k_clean,
        v_clean,
        segment_ids=segment_ids,
        positions=positions,
        block_start=block_start,
    )
