"""Head and cross-entropy with its gradients, against materialised logits."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.device.case import TF32, Case, Program, Rival, Setting, Tolerance, Work
from pallas_kernels.linear_cross_entropy import linear_cross_entropy, reference
from pallas_kernels.linear_cross_entropy.shapes import SHAPES, Shape

TILE_ROWS = (1024, 2048, 4096, 8192)
FORMULA = "weight, rows and their gradients once; 6 R' D V FLOP for R' labelled rows, recomputation not counted"
TOLERANCE = Tolerance(
    relative=6e-3, largest=2e-2, reason="gradients: bfloat16 cotangents of the logits, and the result is rounded"
)
# Rows of the truth: its float32 logits would not fit beside the rest at 32k rows.
TRUTH_ROWS = 2048


def cases(setting: Setting) -> list[Case]:
    """Every shape, forward and backward: no one trains with half of it."""
    return [_case(name, shape) for name, shape in SHAPES.items()]


def _case(name: str, shape: Shape) -> Case:
    dtype = jnp.dtype(shape.dtype)

    def make_inputs(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 4)
        hidden = jax.random.normal(keys[0], (shape.rows, shape.width), dtype)
        weight = jax.random.normal(keys[1], (shape.vocab_size, shape.width), dtype) * shape.width**-0.5
        labels = jax.random.randint(keys[2], (shape.rows,), 0, shape.vocab_size, jnp.int32)
        order = jax.random.permutation(keys[3], shape.rows)
        return hidden, weight, labels, (order < shape.num_labelled).astype(jnp.float32)

    is_tiny = name.startswith("tiny")
    return Case(
        op="linear_cross_entropy",
        shape=name,
        rank=0 if name == "8b_8k" else 3 if is_tiny else 1,
        is_for_dry=name == "tiny",
        is_timed=not is_tiny,
        make_inputs=make_inputs,
        programs={"reference": _with_gradients(linear_cross_entropy)},
        truth=_truth,
        tolerance=TOLERANCE if dtype == jnp.bfloat16 else TF32,
        work=Work(
            num_bytes=dtype.itemsize * 2 * (shape.vocab_size + shape.rows) * shape.width,
            num_flops=6 * shape.num_labelled * shape.width * shape.vocab_size,
            formula=FORMULA,
        ),
        rivals={"materialised logits": Rival(program=_with_gradients(reference.linear_cross_entropy))},
        torch={
            "kind": "linear_cross_entropy",
            "rows": shape.num_labelled,
            "width": shape.width,
            "vocab_size": shape.vocab_size,
        },
        tunings={
            '"tile_rows"': {
                str(rows): _with_gradients(functools.partial(linear_cross_entropy, tile_rows=rows))
                for rows in TILE_ROWS
            }
        },
    )


def _with_gradients(op: Program) -> Program:
    """Mean loss, and its gradients with respect to rows and weight."""

    def program(hidden: jax.Array, weight: jax.Array, labels: jax.Array, row_weights: jax.Array):
        def mean_loss(hidden: jax.Array, weight: jax.Array) -> jax.Array:
            losses, _ = op(hidden, weight, labels, row_weights)
            return jnp.sum(losses * row_weights) / jnp.sum(row_weights)

        return jax.value_and_grad(mean_loss, (0, 1))(hidden, weight)

    return program


def _truth(hidden: jax.Array, weight: jax.Array, labels: jax.Array, row_weights: jax.Array):
    """The same in float32, in pieces of rows that are summed afterwards."""
    total = jnp.sum(row_weights)
    wide = weight.astype(jnp.float32)
    pieces = -(-hidden.shape[0] // TRUTH_ROWS)
    rows = -(-hidden.shape[0] // pieces)

    def split(array: jax.Array) -> jax.Array:
        padding = ((0, pieces * rows - array.shape[0]),) + ((0, 0),) * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(pieces, rows, *array.shape[1:])

    def piece(sums: tuple[jax.Array, jax.Array], arrays: tuple[jax.Array, ...]):
        hidden, labels, row_weights = arrays

        def share(hidden: jax.Array, weight: jax.Array) -> jax.Array:
            losses, _ = reference.linear_cross_entropy(hidden, weight, labels, row_weights)
            return jnp.sum(losses * row_weights) / total

        loss, (hidden_grad, weight_grad) = jax.value_and_grad(share, (0, 1))(hidden, wide)
        return (sums[0] + loss, sums[1] + weight_grad), hidden_grad

    with jax.default_matmul_precision("highest"):
        arrays = split(hidden.astype(jnp.float32)), split(labels), split(row_weights)
        (loss, weight_grad), hidden_grads = jax.lax.scan(piece, (jnp.zeros(()), jnp.zeros_like(wide)), arrays)
    return loss, (hidden_grads.reshape(pieces * rows, -1)[: hidden.shape[0]], weight_grad)
