"""The gated low-rank update: rows it leaves alone are the base product's, bit for bit, and teach it nothing."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_lora import gated_lora
from pallas_kernels.gated_lora.shapes import SHAPES

TINY = {name: shape for name, shape in SHAPES.items() if name.startswith("tiny")}
SCALE = 1.5


def inputs(rows, width, columns, rank, dtype=jnp.float32):
    random = np.random.default_rng(rows * 100 + width)
    shapes = [(rows, width), (width, columns), (width, rank), (rank, columns)]
    arrays = [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(np.arange(rows) % 2 == 0)


def of(shape, dtype=jnp.float32):
    return inputs(shape.rows, shape.width, shape.columns, shape.rank, dtype)


@pytest.mark.parametrize("name", TINY)
def test_gated_rows_get_the_update_and_others_do_not(name: str):
    x, kernel, lora_a, lora_b, gate = of(TINY[name])
    wide = [np.asarray(array, np.float64) for array in (x, kernel, lora_a, lora_b)]
    want = wide[0] @ wide[1] + SCALE * np.asarray(gate)[:, None] * (wide[0] @ wide[2] @ wide[3])
    # Float32 sums of at most 12 terms of magnitude up to about 10.
    np.testing.assert_allclose(gated_lora(x, kernel, lora_a, lora_b, gate, SCALE), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_without_the_gate_have_the_bits_of_the_base_product(dtype):
    x, kernel, lora_a, lora_b, gate = inputs(37, 96, 64, 8, dtype)
    base = jax.jit(jnp.matmul)(x, kernel)
    ours = jax.jit(gated_lora, static_argnums=5)(x, kernel, lora_a, lora_b, gate, SCALE)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours[~gate], base[~gate])
    assert (np.asarray(ours[gate], np.float32) != np.asarray(base[gate], np.float32)).any(axis=1).all()


def test_rows_without_the_gate_give_the_adapter_no_gradient():
    x, kernel, lora_a, lora_b, gate = inputs(12, 10, 9, 3)

    def total(lora_a, lora_b, row_weights):
        return jnp.sum(row_weights[:, None] * jnp.sin(gated_lora(x, kernel, lora_a, lora_b, gate, SCALE)))

    grads = jax.grad(total, (0, 1))
    for grad in grads(lora_a, lora_b, jnp.where(gate, 0.0, 1.0)):
        assert not grad.any()
    # What the gated rows teach is the same whatever the others are worth.
    alone, together = grads(lora_a, lora_b, jnp.where(gate, 1.0, 0.0)), grads(lora_a, lora_b, jnp.ones(12))
    for one, other in zip(alone, together, strict=True):
        assert one.any()
        np.testing.assert_array_equal(one, other)


def test_a_row_of_nan_without_the_gate_spoils_no_gradient_of_the_adapter():
    x, kernel, lora_a, lora_b, gate = inputs(6, 5, 4, 2)
    outputs = gated_lora(x.at[1].set(jnp.inf), kernel, lora_a, lora_b, gate, SCALE)
    assert jnp.isfinite(outputs[gate]).all()


def test_wrong_arguments_are_named():
    x, kernel, lora_a, lora_b, gate = inputs(4, 6, 5, 2)
    # As a user meets it, without the test run's own checks of every hint.
    call = inspect.unwrap(gated_lora)
    with pytest.raises(ValueError, match=r"kernel\.shape=\(6, 5\), but x\.shape=\(4, 3\)"):
        call(x[:, :3], kernel, lora_a, lora_b, gate, SCALE)
    with pytest.raises(ValueError, match=r"lora_b\.shape=\(1, 5\).* needs \[6, r\], \[r, 5\]"):
        call(x, kernel, lora_a, lora_b[:1], gate, SCALE)
    with pytest.raises(ValueError, match=r"gate\.shape=\(3,\)"):
        call(x, kernel, lora_a, lora_b, gate[:3], SCALE)
    with pytest.raises(TypeError, match=r"lora_a\.dtype=.*bfloat16"):
        call(x, kernel, lora_a.astype(jnp.bfloat16), lora_b, gate, SCALE)
    with pytest.raises(TypeError, match=r"must be bool"):
        call(x, kernel, lora_a, lora_b, gate.astype(jnp.int32), SCALE)
