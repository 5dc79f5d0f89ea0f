"""Training attention over a noisy and a clean stream of the same packed documents: the contract of the op."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import Body, device_kind, refuse
from pallas_kernels.two_stream_attention import fused, reference
from pallas_kernels.two_stream_attention import tiles as tiles_module
from pallas_kernels.two_stream_attention.streams import Stream
from pallas_kernels.two_stream_attention.tiles import Tiles

# Name of outputs and row statistics for `jax.checkpoint_policies.save_only_these_names`: kept under
# rematerialisation, they spare the backward pass a second run of the forward kernel.
SAVED = fused.SAVED
BODIES = (Body.REFERENCE, Body.TRITON, Body.TPU)
# Of the kernel bodies.
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


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
    body: Body = Body.REFERENCE,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B L N H"], Float[Array, "B L N H"]]:
    """Attends within each stream and from the noisy stream to the clean one; never from clean to noisy.

    out = softmax(q k^T / sqrt(H)) v over the keys a row sees, all of its own non-zero segment:

    - clean row i sees clean key j where `positions[j] <= positions[i]`;
    - noisy row i sees clean key j where `positions[j] < block_start[i]`;
    - noisy row i sees noisy key j where `block_start[j] == block_start[i]`, `positions[j] <= positions[i]`.

    The rows of a segment are neighbours, in order, at consecutive positions, and no two runs of rows share a
    segment id: the kernel bodies read row numbers where the sentences above read positions, and skip what no row
    of a tile sees; their two runs agree bit for bit. Scores, softmax and accumulation are float32. Kernels are not
    partitioned by XLA: where batch or heads are sharded, call the op inside `jax.shard_map`.

    A segment of l rows has l * (l + 1) visible pairs, whatever its blocks: a noisy row sees as many keys as the
    clean row beside it. The matrix products take 4 * N * H FLOP per pair forward and 10 * N * H backward.

    Args:
        q_noisy: rotated queries of the noisy stream; query head n reads key head n // (N / K).
        k_noisy: rotated keys of the noisy stream.
        v_noisy: values of the noisy stream.
        q_clean: rotated queries of the clean stream.
        k_clean: rotated keys of the clean stream.
        v_clean: values of the clean stream.
        segment_ids: document of each row; 0 is padding, which sees nothing and is seen by nothing.
        positions: position of each row inside its document; any value in padding.
        block_start: position at which the row's block starts, at most the row's own, 0 or less for the first
            block; any value in padding.
        body: which implementation runs.
        tiles: of the kernel bodies; by default those of the device's kind.
        interpret: run a kernel body in Pallas' interpreter.

    Returns:
        The noisy and the clean rows, in the dtype of the values; a row that sees nothing is 0, and so are its
        gradients.

    Raises:
        ValueError: shapes disagree, or N is no multiple of K.
        TypeError: the six streams do not share one floating dtype, or an index array is not of integers.
        NotImplementedError: `body` does not exist here, or is a kernel that lacks this head width, dtype or size.

    Source: I-DLM (arXiv 2604.11035), training on the concatenation [x_t | x_0]. differs: block starts are
    data, not multiples of one block length, so every document can shift its own block grid.
    """
    streams = {"q_noisy": q_noisy, "k_noisy": k_noisy, "v_noisy": v_noisy}
    streams |= {"q_clean": q_clean, "k_clean": k_clean, "v_clean": v_clean}
    indices = {"segment_ids": segment_ids, "positions": positions, "block_start": block_start}
    _check(streams, indices)
    if body is Body.REFERENCE:
        return reference.two_stream_attention(q_noisy, k_noisy, v_noisy, q_clean, k_clean, v_clean, **indices)
    noisy, clean = fused.attend(
        Stream(q_noisy, k_noisy, v_noisy),
        Stream(q_clean, k_clean, v_clean),
        **indices,
        body=body,
        tiles=_choose_tiles(q_clean, body, tiles),
        interpret=interpret,
    )
    assert noisy is not None and clean is not None
    return noisy, clean


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
    body: Body = Body.REFERENCE,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """The noisy stream of `two_stream_attention` by itself, over clean keys and values that are constants.

    For a clean stream made by frozen weights, whose rows have run before (`packed_causal_attention`): `k_clean` and
    `v_clean` receive no gradient, and none is computed. A segment of l rows has l * (l + 1) / 2 visible pairs, of
    4 * N * H FLOP forward and 6 * N * H (noisy queries) plus 4 * N * H a pair of one block backward. Arguments,
    errors and layout are those of `two_stream_attention`.
    """
    streams = {"q_noisy": q_noisy, "k_noisy": k_noisy, "v_noisy": v_noisy, "k_clean": k_clean, "v_clean": v_clean}
    indices = {"segment_ids": segment_ids, "positions": positions, "block_start": block_start}
    _check(streams, indices)
    k_clean, v_clean = jax.lax.stop_gradient((k_clean, v_clean))
    if body is Body.REFERENCE:
        return reference.noisy_attention(q_noisy, k_noisy, v_noisy, k_clean, v_clean, **indices)
    out, _ = fused.attend(
        Stream(q_noisy, k_noisy, v_noisy),
        Stream(None, k_clean, v_clean),
        **indices,
        body=body,
        tiles=_choose_tiles(q_noisy, body, tiles),
        interpret=interpret,
    )
    assert out is not None
    return out


def packed_causal_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    body: Body = Body.REFERENCE,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """The clean stream of `two_stream_attention` by itself: causal attention inside each packed document.

    A segment of l rows has l * (l + 1) / 2 visible pairs. Arguments, errors and layout are those of
    `two_stream_attention`.
    """
    _check({"q_clean": q, "k_clean": k, "v_clean": v}, {"segment_ids": segment_ids, "positions": positions})
    if body is Body.REFERENCE:
        return reference.packed_causal_attention(q, k, v, segment_ids=segment_ids, positions=positions)
    _, out = fused.attend(
        None,
        Stream(q, k, v),
        segment_ids=segment_ids,
        positions=positions,
        # Blocks of one row: whole tiles are those whose last key comes before the tile's first row.
        block_start=positions,
        body=body,
        tiles=_choose_tiles(q, body, tiles),
        interpret=interpret,
    )
    assert out is not None
    return out


def _check(streams: dict[str, Array], indices: dict[str, Array]) -> None:
    queries, keys = next(iter(streams.values())), streams["k_clean"]
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    for name, stream in streams.items():
        expected = (batch, length, heads if name.startswith("q") else kv_heads, head_dim)
        if stream.shape != expected:
            raise ValueError(f"{name}.shape={stream.shape}, but queries and k_clean imply {expected}")
        if stream.dtype != queries.dtype or not jnp.issubdtype(stream.dtype, jnp.floating):
            raise TypeError(
                f"{name}.dtype={stream.dtype}, but all streams need one floating dtype, here {queries.dtype}"
            )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    for name, index in indices.items():
        if index.shape != (batch, length):
            raise ValueError(f"{name}.shape={index.shape}, but queries imply {(batch, length)}")
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(f"{name}.dtype={index.dtype} is not an integer dtype")


def _choose_tiles(q: Float[Array, "B L N H"], body: Body, tiles: Tiles | None) -> Tiles:
    """Tiles for a kernel body, or its refusal."""
    if body not in BODIES:
        raise refuse("two_stream_attention", body, "does not exist", BODIES)
    _, length, _, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise refuse("two_stream_attention", body, f"needs a head width in {HEAD_DIMS}, not {head_dim}", BODIES)
    if q.dtype not in DTYPES:
        raise refuse("two_stream_attention", body, f"needs bfloat16 or float32, not {q.dtype}", BODIES)
    if body is Body.TRITON and q.size >= 2**31:
        raise refuse("two_stream_attention", body, f"counts elements in 32 bits; {q.shape=} has too many", BODIES)
    if tiles is None:
        tiles = tiles_module.for_length(body, device_kind(), q.dtype.itemsize, length)
    return tiles
