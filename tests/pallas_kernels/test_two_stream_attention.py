"""The op against its sentence, read row by row in numpy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.two_stream_attention import two_stream_attention

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 13, 4, 2, 8


def streams(dtype=jnp.float32):
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.normal(size=(BATCH, LENGTH, heads, HEAD_DIM)), dtype)
        for heads in [HEADS, KV_HEADS, KV_HEADS] * 2
    ]


def packed():
    """Row 0: documents of 5 and 6 tokens, the second's grid shifted by 1; padding. Row 1: one document."""
    segment_ids = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13])
    positions = np.array([[*range(5), *range(6), 0, 0], [*range(13)]])
    block_start = np.array([[0, 0, 0, 3, 3, -1, -1, 2, 2, 2, 5, 0, 0], [3 * (i // 3) for i in range(13)]])
    arrays = {"segment_ids": segment_ids, "positions": positions, "block_start": block_start}
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def by_definition(arrays, segment_ids, positions, block_start):
    """One softmax per row over the list of keys it may see."""
    q_noisy, k_noisy, v_noisy, q_clean, k_clean, v_clean = (np.asarray(x, np.float64) for x in arrays)
    noisy, clean = np.zeros(q_noisy.shape), np.zeros(q_noisy.shape)
    for b in range(BATCH):
        segment, position, start = (np.asarray(x)[b] for x in (segment_ids, positions, block_start))
        for i in range(LENGTH):
            mates = [j for j in range(LENGTH) if segment[i] != 0 and segment[j] == segment[i]]
            past = [j for j in mates if position[j] <= position[i]]
            before_block = [j for j in mates if position[j] < start[i]]
            in_block = [j for j in past if start[j] == start[i]]
            for n in range(HEADS):
                g = n // (HEADS // KV_HEADS)

                def mix(q, keys, values):
                    if not keys:
                        return 0.0
                    scores = np.array([q @ k for k in keys]) / np.sqrt(HEAD_DIM)
                    weights = np.exp(scores - scores.max())
                    return weights / weights.sum() @ np.stack(values)

                clean[b, i, n] = mix(
                    q_clean[b, i, n], [k_clean[b, j, g] for j in past], [v_clean[b, j, g] for j in past]
                )
                noisy[b, i, n] = mix(
                    q_noisy[b, i, n],
                    [k_clean[b, j, g] for j in before_block] + [k_noisy[b, j, g] for j in in_block],
                    [v_clean[b, j, g] for j in before_block] + [v_noisy[b, j, g] for j in in_block],
                )
    return noisy, clean


def test_rows_see_exactly_what_the_definition_says():
    arrays, indices = streams(), packed()
    ours = jax.jit(two_stream_attention)(*arrays, **indices)
    for got, want in zip(ours, by_definition(arrays, **indices), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_bfloat16_streams_are_scored_in_float32():
    arrays, indices = streams(jnp.bfloat16), packed()
    for got, want in zip(two_stream_attention(*arrays, **indices), by_definition(arrays, **indices), strict=True):
        assert got.dtype == jnp.bfloat16
        # Probabilities and result are rounded to 8 bits each.
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def test_padding_returns_zero_and_has_zero_gradient():
    arrays, indices = streams(), packed()
    noisy, clean = jax.jit(two_stream_attention)(*arrays, **indices)
    assert not noisy[0, 11:].any() and not clean[0, 11:].any()

    def total(*arrays):
        return sum(jnp.sum(jnp.sin(out)) for out in two_stream_attention(*arrays, **indices))

    for grad in jax.jit(jax.grad(total, range(6)))(*arrays):
        assert jnp.isfinite(grad).all()
        assert not grad[0, 11:].any()
        assert grad[0, :11].any()


def test_gradients_equal_finite_differences():
    op = jax.jit(lambda *arrays: two_stream_attention(*arrays, **packed()))
    check_grads(op, streams(), order=1, modes=["rev"], eps=1e-2)


def test_the_clean_stream_never_depends_on_the_noisy_one():
    arrays, indices = streams(), packed()

    def clean(*noisy):
        return two_stream_attention(*noisy, *arrays[3:], **indices)[1]

    _, vjp = jax.vjp(clean, *arrays[:3])
    assert not any(grad.any() for grad in vjp(jnp.ones(arrays[0].shape)))


def test_no_array_is_as_large_as_the_joint_score_matrix():
    arrays, indices = streams(), packed()
    jaxpr = jax.make_jaxpr(lambda *arrays: two_stream_attention(*arrays, **indices))(*arrays)
    largest = max(var.aval.size for equation in jaxpr.eqns for var in equation.outvars)
    assert largest == BATCH * HEADS * LENGTH * 2 * LENGTH


def test_malformed_arguments_name_what_is_wrong():
    # Unwrapped: the shape hints that the test run enforces would otherwise answer first.
    op = inspect.unwrap(two_stream_attention)
    arrays, indices = streams(), packed()
    with pytest.raises(ValueError, match=r"v_noisy.shape=\(2, 12, 2, 8\).*imply \(2, 13, 2, 8\)"):
        op(*arrays[:2], arrays[2][:, :12], *arrays[3:], **indices)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        three = [jnp.zeros((BATCH, LENGTH, 3, HEAD_DIM))] * 2
        op(arrays[0], *three, arrays[3], *three, **indices)
    with pytest.raises(ValueError, match=r"positions.shape=\(2, 4\)"):
        op(*arrays, **(indices | {"positions": indices["positions"][:, :4]}))
    with pytest.raises(TypeError, match=r"k_noisy.dtype=bfloat16"):
        op(arrays[0], arrays[1].astype(jnp.bfloat16), *arrays[2:], **indices)
    with pytest.raises(TypeError, match=r"segment_ids.dtype=float32"):
        op(*arrays, **(indices | {"segment_ids": jnp.ones((BATCH, LENGTH))}))
