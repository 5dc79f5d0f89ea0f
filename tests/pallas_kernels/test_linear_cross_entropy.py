"""The tiled op against materialised logits: value, gradient, dropped rows, memory."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy, reference, tiled


def inputs(rows, width, vocab_size, dtype=jnp.float32, keep=0.6):
    random = np.random.default_rng(rows * 1000 + vocab_size)
    hidden, weight = random.normal(size=(rows, width)), random.normal(size=(vocab_size, width))
    row_weights = np.where(random.random(rows) < keep, random.normal(size=rows), 0.0)
    garbage = np.arange(rows) * 7919 - 5
    labels = np.where(row_weights != 0, random.integers(0, vocab_size, rows), garbage)
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(weight, dtype),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(row_weights, jnp.float32),
    )


def in_tiles_of(tile_rows):
    return functools.partial(linear_cross_entropy, tile_rows=tile_rows)


def outputs_and_grads(op, hidden, weight, labels, row_weights):
    """Both outputs, and the gradients of a scalar that reaches both with another factor on each row."""

    def total(hidden, weight):
        loss, lse = op(hidden, weight, labels, row_weights)
        return jnp.sum(loss * row_weights) + 0.1 * jnp.sum(jnp.sin(lse)), (loss, lse)

    grads, outputs = jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, weight)
    return outputs, grads


@pytest.mark.parametrize(("rows", "vocab_size", "tile_rows"), [(37, 53, 8), (37, 53, 64), (16, 101, 1), (1, 3, 8)])
def test_values_and_gradients_equal_materialised_logits(rows, vocab_size, tile_rows):
    arrays = inputs(rows, 12, vocab_size)
    ours = outputs_and_grads(in_tiles_of(tile_rows), *arrays)
    expected = outputs_and_grads(reference.linear_cross_entropy, *arrays)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_inputs_are_accumulated_in_float32():
    hidden, weight, labels, row_weights = inputs(200, 64, 331, jnp.bfloat16)
    outputs, grads = outputs_and_grads(in_tiles_of(16), hidden, weight, labels, row_weights)
    # bfloat16 inputs are exact in float32, so the forward is as exact as the float32 one.
    wide = hidden.astype(jnp.float32), weight.astype(jnp.float32)
    exact_outputs, exact_grads = outputs_and_grads(reference.linear_cross_entropy, *wide, labels, row_weights)
    for got, want in zip(outputs, exact_outputs, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    for got, want in zip(grads, exact_grads, strict=True):
        assert got.dtype == jnp.bfloat16
        # Two roundings to 8 bits: the logits' cotangent and the result. Summing tiles in bfloat16 has more.
        error = np.asarray(got, np.float32) - np.asarray(want)
        assert np.linalg.norm(error) / np.linalg.norm(want) < 3e-3


@pytest.mark.parametrize("frozen_columns", [5, 12])
def test_frozen_columns_get_no_gradient_and_change_nothing_else(frozen_columns):
    arrays = inputs(37, 12, 53)
    outputs, (hidden_bar, weight_bar) = outputs_and_grads(
        functools.partial(linear_cross_entropy, tile_rows=8, frozen_columns=frozen_columns), *arrays
    )
    whole_outputs, (whole_hidden_bar, whole_weight_bar) = outputs_and_grads(in_tiles_of(8), *arrays)
    np.testing.assert_array_equal(outputs, whole_outputs)
    np.testing.assert_array_equal(hidden_bar, whole_hidden_bar)
    assert not weight_bar[:, :frozen_columns].any()
    # The same sums, of a product that is narrower.
    np.testing.assert_allclose(weight_bar[:, frozen_columns:], whole_weight_bar[:, frozen_columns:], atol=1e-6)


def test_weights_of_zero_give_zero_loss_and_gradient():
    results = outputs_and_grads(in_tiles_of(8), *inputs(20, 8, 11, keep=0.0))
    assert not any(result.any() for result in jax.tree.leaves(results))


def test_dropped_rows_may_hold_anything_even_nan():
    hidden, weight, labels, row_weights = inputs(37, 12, 53)
    spoiled = jnp.where((row_weights == 0)[:, None], jnp.nan, hidden)
    ours = outputs_and_grads(in_tiles_of(8), spoiled, weight, labels, row_weights)
    clean = outputs_and_grads(in_tiles_of(8), hidden, weight, labels, row_weights)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_label_outside_the_vocabulary_on_a_kept_row_is_not_silent():
    hidden, weight, _, _ = inputs(4, 8, 11)
    labels = jnp.array([0, -1, 11, 10], jnp.int32)
    loss, lse = linear_cross_entropy(hidden, weight, labels, jnp.ones(4))
    np.testing.assert_array_equal(jnp.isnan(loss), [False, True, True, False])
    assert jnp.isfinite(lse).all()


def test_tiles_beyond_the_rows_that_matter_cost_no_matmul(monkeypatch):
    rows, tile_rows = 64, 8
    hidden, weight, labels, _ = inputs(rows, 8, 11)
    labels = labels % 11
    # Nine rows: two tiles.
    row_weights = jnp.zeros(rows).at[jnp.array([3, 9, 17, 18, 19, 30, 40, 50, 63])].set(1.0)
    products = []
    tile_logits = tiled._tile_logits

    def counted(tile_hidden, weight):
        jax.debug.callback(lambda: products.append(1))
        return tile_logits(tile_hidden, weight)

    monkeypatch.setattr(tiled, "_tile_logits", counted)

    def first_row_loss(hidden):
        loss, _ = linear_cross_entropy(hidden, weight, labels, row_weights, tile_rows=tile_rows)
        return loss[3]

    _, vjp = jax.vjp(first_row_loss, hidden)
    jax.effects_barrier()
    assert len(products) == 2
    vjp(jnp.float32(1))
    jax.effects_barrier()
    # Only one row has a cotangent: one more tile, in the backward pass.
    assert len(products) == 3


def test_logits_of_all_rows_never_exist():
    rows, width, vocab_size, tile_rows = 4096, 16, 4001, 128

    def total(hidden, weight, labels, row_weights):
        loss, _ = linear_cross_entropy(hidden, weight, labels, row_weights, tile_rows=tile_rows)
        return jnp.sum(loss * row_weights)

    shapes = [
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab_size, width), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    ]
    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*shapes).compile()
    temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
    # 66 MB if materialised; a tile takes 2 MB, and XLA holds a few of them.
    assert temporary_bytes < rows * vocab_size * 4 / 6


def test_malformed_arguments_name_what_is_wrong():
    # Unwrapped: the shape hints that the test run enforces would otherwise answer first.
    op = inspect.unwrap(linear_cross_entropy)
    hidden, weight, labels, row_weights = inputs(4, 8, 11)
    with pytest.raises(ValueError, match=r"weight.shape=\(11, 7\).*needs \[V, 8\]"):
        op(hidden, weight[:, :7], labels, row_weights)
    with pytest.raises(ValueError, match=r"labels.shape=\(3,\).*4 rows"):
        op(hidden, weight, labels[:3], row_weights)
    with pytest.raises(ValueError, match="tile_rows=0"):
        op(hidden, weight, labels, row_weights, tile_rows=0)
    with pytest.raises(ValueError, match=r"frozen_columns=9 must be in \[0, 8\]"):
        op(hidden, weight, labels, row_weights, frozen_columns=9)
    with pytest.raises(TypeError, match="same floating dtype"):
        op(hidden, weight.astype(jnp.bfloat16), labels, row_weights)
    with pytest.raises(TypeError, match="not an integer"):
        op(hidden, weight, row_weights, row_weights)
