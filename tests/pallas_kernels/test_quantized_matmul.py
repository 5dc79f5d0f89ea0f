"""The contract of the quantised product, each body against float64; and what quantising promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bodies import Body
from pallas_kernels.quantized_matmul import (
    QuantizedWeight,
    TpuTiles,
    TritonTiles,
    quantize_fp8,
    quantize_int8,
    quantized_matmul,
    reference,
)
from pallas_kernels.quantized_matmul.shapes import SHAPES, TINY
from pallas_kernels.quantized_matmul.tiles import triton_tiles

BODIES = [Body.REFERENCE, Body.TRITON, Body.TPU]
PALLAS_BODIES = BODIES[1:]
QUANTIZE = {"int8": quantize_int8, "fp8": quantize_fp8}
# Several steps along D, so that the order of summation and the edges are seen.
TILES = {
    Body.REFERENCE: None,
    Body.TRITON: TritonTiles(columns=32, depth=16),
    Body.TPU: TpuTiles(rows=32, columns=128, depth=128),
}


def inputs(rows, width, columns, dtype=jnp.float32, form="int8"):
    random = np.random.default_rng(rows * 1000 + width)
    weight = random.normal(size=(width, columns)) * random.uniform(0.1, 10, size=columns)
    return jnp.asarray(random.normal(size=(rows, width)), dtype), QUANTIZE[form](jnp.asarray(weight, jnp.float32))


@functools.partial(jax.jit, static_argnames=("body", "tiles"))
def run(x, weight, layer=None, *, body, tiles=None):
    return quantized_matmul(x, weight, layer, body=body, interpret=body is not Body.REFERENCE, tiles=tiles)


def exact(x, weight):
    """The formula in float64, where 8-bit values, bfloat16 rows and their products are exact."""
    return np.asarray(x, np.float64) @ np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)


def largest(weight, x):
    """Per column, the largest sum of magnitudes: what rounding errors are measured against."""
    return exact(jnp.abs(x), QuantizedWeight(jnp.abs(weight.values.astype(jnp.float32)), weight.scale)).max(axis=0)


@pytest.mark.parametrize("form", QUANTIZE)
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("body", BODIES)
def test_float32_rows_give_the_formula(body: Body, name: str, form: str):
    shape = TINY[name]
    x, weight = inputs(shape.rows, shape.width, shape.columns, form=form)
    out = run(x, weight, body=body, tiles=TILES[body])
    assert out.dtype == jnp.float32
    assert out.shape == (shape.rows, shape.columns)
    # A float32 sum of `width` terms, in any order, errs by less than width * 2^-24 of the sum of magnitudes.
    bound = (shape.width + 2) * 2.0**-24 * largest(weight, x)
    assert (np.abs(np.asarray(out, np.float64) - exact(x, weight)) <= bound).all()


@pytest.mark.parametrize("form", QUANTIZE)
@pytest.mark.parametrize("body", BODIES)
def test_bfloat16_rows_are_summed_in_float32_and_rounded_once(body: Body, form: str):
    x, weight = inputs(7, 300, 40, jnp.bfloat16, form)
    out = run(x, weight, body=body, tiles=TILES[body])
    assert out.dtype == jnp.bfloat16
    want = exact(x, weight)
    # One rounding to 8 bits of mantissa, after sums as exact as those of float32 rows.
    bound = 2.0**-8 * np.abs(want) + 300 * 2.0**-24 * largest(weight, x)
    assert (np.abs(np.asarray(out, np.float64) - want) <= bound).all()


@pytest.mark.parametrize("body", PALLAS_BODIES)
def test_bits_of_a_row_depend_neither_on_m_nor_on_its_neighbours(body: Body):
    x, weight = inputs(70, 77, 33)
    together = run(x, weight, body=body, tiles=TILES[body])
    for rows in (slice(0, 1), slice(5, 13), slice(40, 57), slice(69, 70)):
        np.testing.assert_array_equal(run(x[rows], weight, body=body, tiles=TILES[body]), together[rows])


@pytest.mark.parametrize("form", QUANTIZE)
@pytest.mark.parametrize("body", BODIES)
def test_a_layer_of_a_stack_has_the_bits_of_its_weight_alone(body: Body, form: str):
    x, first = inputs(9, 77, 33, form=form)
    weights = [first, *(inputs(rows, 77, 33, form=form)[1] for rows in (2, 3))]
    assert not jnp.array_equal(weights[1].scale, weights[2].scale)
    stack = QuantizedWeight(*(jnp.stack(parts) for parts in zip(*weights, strict=True)))
    for layer, weight in enumerate(weights):
        alone = run(x, weight, body=body, tiles=TILES[body])
        np.testing.assert_array_equal(run(x, stack, jnp.int32(layer), body=body, tiles=TILES[body]), alone)


@pytest.mark.parametrize("body", BODIES)
def test_two_runs_are_bitwise_equal(body: Body):
    x, weight = inputs(9, 130, 50, jnp.bfloat16)
    first, second = (np.asarray(run(x, weight, body=body, tiles=TILES[body])) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


@pytest.mark.parametrize("body", BODIES)
def test_a_row_of_nan_spoils_no_other(body: Body):
    x, weight = inputs(20, 33, 17)
    clean = run(x, weight, body=body, tiles=TILES[body])
    spoiled = run(x.at[3].set(jnp.nan), weight, body=body, tiles=TILES[body])
    assert jnp.isnan(spoiled[3]).all()
    np.testing.assert_array_equal(np.delete(spoiled, 3, axis=0), np.delete(clean, 3, axis=0))


@pytest.mark.parametrize("body", BODIES)
def test_no_rows_give_no_rows(body: Body):
    x, weight = inputs(0, 8, 5)
    assert run(x, weight, body=body).shape == (0, 5)


@pytest.mark.parametrize("body", PALLAS_BODIES)
def test_default_tiles_serve_any_shape(body: Body):
    x, weight = inputs(2, 150, 140)
    np.testing.assert_allclose(run(x, weight, body=body), reference.quantized_matmul(x, weight), rtol=1e-4, atol=1e-3)


def test_int8_is_within_half_a_level_and_symmetric():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(64, 9)) * np.arange(1, 10), jnp.float32)
    values, scale = quantize_int8(weight)
    assert values.dtype == jnp.int8
    error = np.abs(np.asarray(values, np.float64) * np.asarray(scale) - np.asarray(weight))
    # 2^-16 for the division, rounded to float32 at up to 127 levels.
    assert (error <= (0.5 + 2**-16) * np.asarray(scale)).all()
    assert (np.abs(np.asarray(values, int)).max(axis=0) == 127).all()
    np.testing.assert_array_equal(quantize_int8(-weight).values, -values)


def test_fp8_is_within_its_three_bits():
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(64, 9)) * np.arange(1, 10), jnp.float32)
    values, scale = quantize_fp8(weight)
    assert values.dtype == jnp.float8_e4m3fn
    wide, steps, exact_weight = (np.asarray(array, np.float64) for array in (values, scale, weight))
    assert (np.abs(wide).max(axis=0) == 448).all()
    bound = np.maximum(2.0**-4 * np.abs(exact_weight), 2.0**-10 * steps) * (1 + 2**-16)
    assert (np.abs(wide * steps - exact_weight) <= bound).all()


@pytest.mark.parametrize("quantize", QUANTIZE.values())
def test_columns_of_zeros_and_empty_columns_stay_finite(quantize):
    values, scale = quantize(jnp.zeros((4, 3), jnp.bfloat16))
    assert not np.asarray(values, np.float32).any()
    assert (scale == 1).all()
    assert quantize(jnp.zeros((0, 3))).scale.shape == (3,)


@pytest.mark.parametrize("body", BODIES)
def test_wrong_arguments_are_named(body: Body):
    x, weight = inputs(4, 6, 5)
    call = functools.partial(quantized_matmul, body=body)
    with pytest.raises(ValueError, match=r"values\.shape=\(6, 5\), but x\.shape=\(4, 3\)"):
        call(x[:, :3], weight)
    with pytest.raises(ValueError, match=r"scale\.shape=\(4,\), but values\.shape=\(6, 5\) needs \(5,\)"):
        call(x, weight._replace(scale=weight.scale[:4]))
    with pytest.raises(TypeError, match=r"float16.* is neither bfloat16 nor float32"):
        call(x.astype(jnp.float16), weight)
    with pytest.raises(TypeError, match=r"int32.* is neither int8 nor float8_e4m3fn"):
        call(x, weight._replace(values=weight.values.astype(jnp.int32)))
    with pytest.raises(TypeError, match=r"bfloat16.* must be float32"):
        call(x, weight._replace(scale=weight.scale.astype(jnp.bfloat16)))
    with pytest.raises(ValueError, match=r"values\.shape=\(6, 5\), but .* needs \[L, D, F\], for a layer is given"):
        call(x, weight, jnp.int32(0))
    stack = QuantizedWeight(*(part[None] for part in weight))
    with pytest.raises(ValueError, match=r"values\.shape=\(1, 6, 5\), but .* needs \[D, F\]"):
        call(x, stack)
    with pytest.raises(ValueError, match=r"scale\.shape=\(5,\), but values\.shape=\(1, 6, 5\) needs \(1, 5\)"):
        call(x, stack._replace(scale=weight.scale), jnp.int32(0))


def test_a_body_that_is_not_there_and_tiles_of_another_body_are_refused():
    x, weight = inputs(4, 6, 5)
    with pytest.raises(NotImplementedError, match=r"jax_triton body does not exist; other bodies: reference, triton"):
        quantized_matmul(x, weight, body=Body.JAX_TRITON)
    with pytest.raises(ValueError, match=r"TpuTiles.* is not for the triton body"):
        quantized_matmul(x, weight, body=Body.TRITON, tiles=TpuTiles())
    with pytest.raises(ValueError, match=r"is not for the reference body"):
        quantized_matmul(x, weight, tiles=TritonTiles(columns=32))
    with pytest.raises(ValueError, match=r"columns=24 must be a power of two"):
        TritonTiles(columns=24)
    with pytest.raises(ValueError, match=r"depth=64 must be a multiple of 128"):
        TpuTiles(depth=64)


def test_rows_do_not_choose_the_tiles_and_real_weights_fill_an_h200():
    for shape in SHAPES.values():
        if shape.width >= 4096:
            columns = triton_tiles("cpu", (shape.width, shape.columns)).columns
            assert shape.columns // columns >= 128
