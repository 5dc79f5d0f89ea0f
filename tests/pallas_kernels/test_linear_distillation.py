"""Tiled KL and total variation against materialised distributions: value, gradient, dropped rows, memory."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_distillation import linear_distillation, reference, tiled
from pallas_kernels.linear_distillation.shapes import SHAPES


def inputs(rows, width, vocab_size, dtype=jnp.float32, kept=0.6):
    random = np.random.default_rng(rows * 1000 + vocab_size)
    student, noise, weight = (random.normal(size=(n, width)) for n in (rows, rows, vocab_size))
    row_weights = np.where(random.random(rows) < kept, random.normal(size=rows), 0.0)
    return (
        jnp.asarray(student, dtype),
        jnp.asarray(student + 0.5 * noise, dtype),
        jnp.asarray(weight, dtype),
        jnp.asarray(row_weights, jnp.float32),
    )


def of_shape(name):
    shape = SHAPES[name]
    return inputs(shape.rows, shape.width, shape.vocab_size, shape.dtype, shape.kept)


def in_tiles_of(tile_rows, excluded_id=2):
    return functools.partial(linear_distillation, excluded_id=excluded_id, tile_rows=tile_rows)


def outputs_and_grads(op, student, teacher, weight, row_weights):
    """Both outputs, and the gradients of a scalar that reaches both with another factor on each row."""

    def total(student, teacher, weight):
        kl, tv = op(student, teacher, weight, row_weights)
        return jnp.sum(kl * row_weights) + jnp.sum(jnp.sin(3 * tv)), (kl, tv)

    grads, outputs = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(student, teacher, weight)
    return outputs, grads


@pytest.mark.parametrize(("shape", "tile_rows"), [("tiny", 8), ("tiny", 64), ("tiny_one_row", 8)])
@pytest.mark.parametrize("excluded_id", [0, 2])
def test_values_and_gradients_equal_materialised_distributions(shape, tile_rows, excluded_id):
    arrays = of_shape(shape)
    ours = outputs_and_grads(in_tiles_of(tile_rows, excluded_id), *arrays)
    expected = outputs_and_grads(functools.partial(reference.linear_distillation, excluded_id=excluded_id), *arrays)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_total_variation_is_one_minus_the_acceptance_of_sampled_drafts():
    student, teacher, weight, _ = of_shape("tiny")
    _, tv = in_tiles_of(8)(student, teacher, weight, jnp.ones(len(student)))
    logits = [np.array(hidden @ weight.T, np.float64) for hidden in (student, teacher)]
    for array in logits:
        array[:, 2] = -np.inf
    q, p = (np.exp(array) / np.exp(array).sum(-1, keepdims=True) for array in logits)
    # Draft x ~ q is kept with probability min(1, p(x) / q(x)).
    kept = np.where(q > 0, q * np.minimum(1, p / np.where(q > 0, q, 1)), 0).sum(-1)
    np.testing.assert_allclose(tv, 1 - kept, atol=1e-6)


@pytest.mark.parametrize("frozen_columns", [3, 12])
def test_frozen_columns_get_no_gradient_and_change_nothing_else(frozen_columns):
    arrays = inputs(37, 12, 53)
    op = functools.partial(linear_distillation, excluded_id=2, tile_rows=8, frozen_columns=frozen_columns)
    outputs, (student_bar, _, weight_bar) = outputs_and_grads(op, *arrays)
    whole_outputs, (whole_student_bar, _, whole_weight_bar) = outputs_and_grads(in_tiles_of(8), *arrays)
    np.testing.assert_array_equal(outputs, whole_outputs)
    np.testing.assert_array_equal(student_bar, whole_student_bar)
    assert not weight_bar[:, :frozen_columns].any()
    # The same sums, of a product that is narrower.
    np.testing.assert_allclose(weight_bar[:, frozen_columns:], whole_weight_bar[:, frozen_columns:], atol=1e-6)


def test_the_teacher_is_a_constant_also_in_the_head():
    student, teacher, weight, row_weights = of_shape("tiny")
    _, (_, teacher_bar, weight_bar) = outputs_and_grads(in_tiles_of(8), student, teacher, weight, row_weights)
    assert not teacher_bar.any()

    def through_p_as_well(weight):
        log_p, log_q = (jax.nn.log_softmax(jnp.delete(hidden @ weight.T, 2, axis=1)) for hidden in (teacher, student))
        kl, tv = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0).sum(-1)
        return jnp.sum(kl * row_weights) + jnp.sum(jnp.where(row_weights != 0, jnp.sin(3 * tv), 0.0))

    assert jnp.abs(weight_bar - jax.grad(through_p_as_well)(weight)).max() > 0.1


def test_equal_distributions_give_exactly_zero_and_no_gradient():
    student, _, weight, row_weights = of_shape("tiny")
    results = outputs_and_grads(in_tiles_of(8), student, student, weight, row_weights)
    assert not any(result.any() for result in jax.tree.leaves(results))


def test_distributions_that_hardly_overlap_stay_finite():
    student, teacher, weight, row_weights = of_shape("tiny")
    (kl, tv), grads = outputs_and_grads(in_tiles_of(8), 100 * student, -100 * teacher, weight, row_weights)
    is_kept = np.asarray(row_weights) != 0
    np.testing.assert_allclose(tv[is_kept], 1, atol=1e-6)
    assert (kl[is_kept] > 100).all()
    assert all(jnp.isfinite(each).all() for each in jax.tree.leaves((kl, grads)))


def test_bfloat16_inputs_are_accumulated_in_float32():
    student, teacher, weight, row_weights = inputs(200, 64, 331, jnp.bfloat16)
    student, teacher = student / 4, teacher / 4
    outputs, grads = outputs_and_grads(in_tiles_of(16), student, teacher, weight, row_weights)
    # bfloat16 inputs are exact in float32, so the forward is as exact as the float32 one.
    wide = [array.astype(jnp.float32) for array in (student, teacher, weight)]
    exact = functools.partial(reference.linear_distillation, excluded_id=2)
    exact_outputs, exact_grads = outputs_and_grads(exact, *wide, row_weights)
    for got, want in zip(outputs, exact_outputs, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    for got, want in zip((grads[0], grads[2]), (exact_grads[0], exact_grads[2]), strict=True):
        assert got.dtype == jnp.bfloat16
        # Two roundings to 8 bits: the logits' cotangent and the result. Summing tiles in bfloat16 has more.
        error = np.asarray(got, np.float32) - np.asarray(want)
        assert np.linalg.norm(error) / np.linalg.norm(want) < 3e-3


def test_dropped_rows_may_hold_anything_even_nan():
    student, teacher, weight, row_weights = of_shape("tiny")
    is_dropped = (row_weights == 0)[:, None]
    spoiled = (jnp.where(is_dropped, jnp.nan, array) for array in (student, teacher))
    ours = outputs_and_grads(in_tiles_of(8), *spoiled, weight, row_weights)
    clean = outputs_and_grads(in_tiles_of(8), student, teacher, weight, row_weights)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(got, want)


def test_weights_of_zero_give_zero_and_no_gradient():
    results = outputs_and_grads(in_tiles_of(8), *inputs(20, 8, 11, kept=0.0))
    assert not any(result.any() for result in jax.tree.leaves(results))


def test_tiles_beyond_the_rows_that_matter_cost_no_matmul(monkeypatch):
    student, teacher, weight, _ = inputs(64, 8, 11)
    # Nine rows: two tiles.
    row_weights = jnp.zeros(64).at[jnp.array([3, 9, 17, 18, 19, 30, 40, 50, 63])].set(1.0)
    products = []
    log_probs = tiled._log_probs

    def counted(*arguments):
        jax.debug.callback(lambda: products.append(1))
        return log_probs(*arguments)

    monkeypatch.setattr(tiled, "_log_probs", counted)
    _, vjp = jax.vjp(lambda student: in_tiles_of(8)(student, teacher, weight, row_weights)[1][3], student)
    jax.effects_barrier()
    assert len(products) == 2 * 2
    vjp(jnp.float32(1))
    jax.effects_barrier()
    # Only one row has a cotangent: one more tile, in the backward pass.
    assert len(products) == 3 * 2


def test_logits_of_all_rows_never_exist():
    rows, width, vocab_size, tile_rows = 4096, 16, 4001, 64

    def total(student, teacher, weight, row_weights):
        kl, tv = in_tiles_of(tile_rows)(student, teacher, weight, row_weights)
        return jnp.sum((kl + tv) * row_weights)

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((rows, width), (rows, width), (vocab_size, width), (rows,))
    ]
    compiled = jax.jit(jax.value_and_grad(total, (0, 2))).lower(*shapes).compile()
    # 131 MB if both were materialised; a tile of both takes 2 MB, and XLA holds a few such pairs.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * rows * vocab_size * 4 / 12


def test_malformed_arguments_name_what_is_wrong():
    # Unwrapped: the shape hints that the test run enforces would otherwise answer first.
    op = functools.partial(inspect.unwrap(linear_distillation), excluded_id=2)
    student, teacher, weight, row_weights = inputs(4, 8, 11)
    with pytest.raises(ValueError, match=r"teacher.shape=\(3, 8\) must equal student.shape=\(4, 8\)"):
        op(student, teacher[:3], weight, row_weights)
    with pytest.raises(ValueError, match=r"weight.shape=\(11, 7\).*needs \[V, 8\]"):
        op(student, teacher, weight[:, :7], row_weights)
    with pytest.raises(ValueError, match=r"row_weights.shape=\(3,\).*4 rows"):
        op(student, teacher, weight, row_weights[:3])
    for token in (-1, 11):
        with pytest.raises(ValueError, match=rf"excluded_id={token} must be one of several tokens"):
            op(student, teacher, weight, row_weights, excluded_id=token)
    with pytest.raises(ValueError, match="tile_rows=0"):
        op(student, teacher, weight, row_weights, tile_rows=0)
    with pytest.raises(TypeError, match="same floating dtype"):
        op(student, teacher.astype(jnp.bfloat16), weight, row_weights)
