"""Every body of the op against its sentence, read row by row in numpy, and against each other."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.bodies import Body
from pallas_kernels.two_stream_attention import (
    BODIES,
    noisy_attention,
    packed_causal_attention,
    two_stream_attention,
)
from pallas_kernels.two_stream_attention.tiles import PassTiles, Tiles

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 45, 4, 2, 16
DOCUMENTS = [[19, 20], [45]]  # of either row of the batch; row 0 ends in padding
NUM_REAL = sum(DOCUMENTS[0])
# Several tiles along either axis, none of which divides the length or a document.
FLAT, TALL, SQUARE = PassTiles(rows=16, keys=32), PassTiles(rows=32, keys=16), PassTiles(rows=32, keys=32)
TILES = {
    Body.REFERENCE: None,
    Body.TRITON: Tiles(forward=FLAT, query_grads=TALL, key_grads=FLAT),
    # Larger, because the TPU interpreter takes its time over every step of a grid.
    Body.TPU: Tiles(forward=TALL, query_grads=SQUARE, key_grads=SQUARE),
}
NAMES = ("q_noisy", "k_noisy", "v_noisy", "q_clean", "k_clean", "v_clean")

every_body = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.value)
# The TPU's interpreter takes half a minute of some.
quick_bodies = pytest.mark.parametrize(
    "body",
    [pytest.param(body, marks=pytest.mark.proof) if body is Body.TPU else body for body in BODIES],
    ids=lambda body: body.value,
)
every_kernel = pytest.mark.parametrize("body", [Body.TRITON, Body.TPU], ids=lambda body: body.value)


@functools.cache
def streams(dtype="float32"):
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(BATCH, LENGTH, heads, HEAD_DIM)) for heads in [HEADS, KV_HEADS, KV_HEADS] * 2]
    if dtype == "bfloat16":
        # Scores of tens: rounded to 8 bits they would be off by tenths, and the weights by a tenth of themselves.
        arrays[0], arrays[3] = 8 * arrays[0], 8 * arrays[3]
    return [jnp.asarray(array, dtype) for array in arrays]


def packed():
    """Row 0: documents of 19 and 20 tokens, the second's grid shifted by 1; padding. Row 1: one document."""
    arrays = np.zeros((3, BATCH, LENGTH), np.int32)
    for row, documents in enumerate(DOCUMENTS):
        first = 0
        for number, length in enumerate(documents):
            position = np.arange(length)
            block_start = (position + number) // 3 * 3 - number
            arrays[:, row, first : first + length] = np.full(length, number + 1), position, block_start
            first += length
    return dict(zip(("segment_ids", "positions", "block_start"), jnp.asarray(arrays), strict=True))


@functools.cache
def program(body):
    """One compilation per body: outputs of both streams and gradients of all six inputs."""

    @jax.jit
    def outs_and_grads(arrays, indices, bars):
        op = functools.partial(two_stream_attention, **indices, body=body, tiles=TILES[body], interpret=True)
        outs, vjp = jax.vjp(op, *arrays)
        return outs, vjp(bars)

    return outs_and_grads


@functools.cache
def cotangents(dtype="float32"):
    random = np.random.default_rng(1)
    return tuple(jnp.asarray(random.normal(size=streams()[0].shape), dtype) for _ in range(2))


@functools.cache
def run(body, dtype="float32"):
    return program(body)(streams(dtype), packed(), cotangents(dtype))


@functools.cache
def by_definition(dtype="float32"):
    """One softmax per row over the list of keys it may see, in float64."""
    q_noisy, k_noisy, v_noisy, q_clean, k_clean, v_clean = (np.asarray(x, np.float64) for x in streams(dtype))
    noisy, clean = np.zeros(q_noisy.shape), np.zeros(q_noisy.shape)
    for b in range(BATCH):
        segment, position, start = (np.asarray(array)[b] for array in packed().values())
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


@every_body
def test_rows_see_exactly_what_the_definition_says(body):
    for got, want in zip(run(body)[0], by_definition(), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


@quick_bodies
def test_bfloat16_streams_are_scored_in_float32(body):
    outs, grads = run(body, "bfloat16")
    for got, want in zip(outs, by_definition("bfloat16"), strict=True):
        assert got.dtype == jnp.bfloat16
        # Probabilities and result are rounded to 8 bits each.
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)

    # The same inputs in float32. Every factor of a gradient is rounded to 8 bits, the outputs among them.
    same = ([array.astype(jnp.float32) for array in arrays] for arrays in (streams("bfloat16"), cotangents("bfloat16")))
    arrays, bars = same
    _, exact = program(Body.REFERENCE)(arrays, packed(), tuple(bars))
    for name, got, want in zip(NAMES, grads, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2 * jnp.max(jnp.abs(want)), err_msg=name)


def test_gradients_of_the_reference_equal_finite_differences():
    op = jax.jit(lambda *arrays: two_stream_attention(*arrays, **packed()))
    check_grads(op, streams(), order=1, modes=["rev"], eps=1e-2)


@every_kernel
def test_gradients_of_the_kernels_equal_the_reference(body):
    for name, got, want in zip(NAMES, run(body)[1], run(Body.REFERENCE)[1], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


@every_body
def test_padding_returns_zero_and_has_zero_gradient(body):
    outs, grads = run(body)
    for array in (*outs, *grads):
        assert jnp.isfinite(array).all()
        assert not array[0, NUM_REAL:].any()
        assert array[0, :NUM_REAL].any()


@functools.cache
def run_with_an_empty_row(body):
    """Row 0 holds nothing but padding; nobody differentiates row 1."""
    indices = {name: array.at[0].set(0) for name, array in packed().items()}
    return program(body)(streams(), indices, tuple(bar.at[1].set(0) for bar in cotangents()))


@every_body
def test_a_row_of_nothing_but_padding_is_zero_and_leaves_the_others_alone(body):
    outs, grads = run_with_an_empty_row(body)
    for array in (*outs, *grads):
        np.testing.assert_array_equal(array[0], 0)
    for got, want in zip(outs, run(body)[0], strict=True):
        np.testing.assert_array_equal(got[1], want[1])


@every_body
def test_zero_cotangents_give_exact_zeros(body):
    for grad in run_with_an_empty_row(body)[1]:
        np.testing.assert_array_equal(grad[1], 0)


@quick_bodies
def test_the_noisy_stream_over_a_constant_clean_one_has_the_same_bits_and_gradients(body):
    @jax.jit
    def out_and_grads(arrays, indices, bar):
        op = functools.partial(noisy_attention, **indices, body=body, tiles=TILES[body], interpret=True)
        out, vjp = jax.vjp(op, *arrays)
        return out, vjp(bar)

    noisy, clean_keys = streams()[:3], streams()[4:]
    out, grads = out_and_grads([*noisy, *clean_keys], packed(), cotangents()[0])
    for got, want in zip((out, *grads[:3]), (run(body)[0][0], *run(body)[1][:3]), strict=True):
        np.testing.assert_array_equal(got, want)
    for grad in grads[3:]:
        np.testing.assert_array_equal(grad, 0)


@every_body
def test_the_clean_stream_never_depends_on_the_noisy_one(body):
    # NaN on the noisy side would show in whatever it touches.
    noisy = [jnp.full_like(array, jnp.nan) for array in streams()[:3]]
    (_, clean), _ = program(body)([*noisy, *streams()[3:]], packed(), cotangents())
    np.testing.assert_array_equal(clean, run(body)[0][1])


@every_kernel
def test_a_second_run_and_a_row_in_another_batch_are_bitwise_the_same(body):
    flipped = {name: array[::-1] for name, array in packed().items()}
    bars = tuple(bar[::-1] for bar in cotangents())
    outs, grads = program(body)([array[::-1] for array in streams()], flipped, bars)
    for got, want in zip((*outs, *grads), (*run(body)[0], *run(body)[1]), strict=True):
        np.testing.assert_array_equal(got[::-1], want)


@every_body
def test_causal_attention_is_the_clean_stream_alone(body):
    indices = {name: packed()[name] for name in ("segment_ids", "positions")}
    op = functools.partial(packed_causal_attention, **indices, body=body, tiles=TILES[body], interpret=True)
    out, vjp = jax.vjp(op, *streams()[3:])
    np.testing.assert_allclose(out, by_definition()[1], atol=2e-6)

    out_bar = jnp.cos(out)
    _, want = jax.vjp(functools.partial(two_stream_attention, **packed()), *streams())
    for got, expected in zip(vjp(out_bar), want((jnp.zeros_like(out), out_bar))[3:], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_malformed_arguments_name_what_is_wrong():
    # Unwrapped: the shape hints that the test run enforces would otherwise answer first.
    op = inspect.unwrap(two_stream_attention)
    arrays, indices = streams(), packed()
    with pytest.raises(ValueError, match=r"v_noisy.shape=\(2, 44, 2, 16\).*imply \(2, 45, 2, 16\)"):
        op(*arrays[:2], arrays[2][:, :44], *arrays[3:], **indices)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        three = [jnp.zeros((BATCH, LENGTH, 3, HEAD_DIM))] * 2
        op(arrays[0], *three, arrays[3], *three, **indices)
    with pytest.raises(ValueError, match=r"positions.shape=\(2, 4\)"):
        op(*arrays, **(indices | {"positions": indices["positions"][:, :4]}))
    with pytest.raises(TypeError, match=r"k_noisy.dtype=bfloat16"):
        op(arrays[0], arrays[1].astype(jnp.bfloat16), *arrays[2:], **indices)
    with pytest.raises(TypeError, match=r"segment_ids.dtype=float32"):
        op(*arrays, **(indices | {"segment_ids": jnp.ones((BATCH, LENGTH))}))


@every_kernel
def test_a_kernel_refuses_what_it_cannot_do_and_names_the_others(body):
    other = "tpu" if body is Body.TRITON else "triton"
    with pytest.raises(
        NotImplementedError, match=rf"{body.value} body needs a head width .*not 8; .*reference, {other}"
    ):
        two_stream_attention(*(array[..., :8] for array in streams()), **packed(), body=body)
    with pytest.raises(
        NotImplementedError, match=rf"{body.value} body needs bfloat16 or float32, not float16; .*refer"
    ):
        two_stream_attention(*(array.astype(jnp.float16) for array in streams()), **packed(), body=body)


def test_the_triton_body_refuses_more_elements_than_it_can_count():
    rows = jax.ShapeDtypeStruct((64, 8192), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((*rows.shape, heads, 128), jnp.bfloat16) for heads in (32, 8))
    op = functools.partial(two_stream_attention, body=Body.TRITON)
    with pytest.raises(NotImplementedError, match="counts elements in 32 bits"):
        jax.eval_shape(op, q, k, k, q, k, k, segment_ids=rows, positions=rows, block_start=rows)


def test_a_body_that_does_not_exist_is_no_other_body():
    with pytest.raises(
        NotImplementedError, match="jax_triton body does not exist; other bodies: reference, triton, tpu"
    ):
        two_stream_attention(*streams(), **packed(), body=Body.JAX_TRITON)
