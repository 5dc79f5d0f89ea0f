"""A projection with the gated adapter, against the base product alone."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.device.case import Case, Rival, Setting, Tolerance, Work, in_float32, sliced
from pallas_kernels.gated_lora import gated_lora
from pallas_kernels.gated_lora.shapes import SHAPES, Shape

SCALE = 2.0
FORMULA = "2 (D F + D r + r F) of weights + 2 M (D + F) of rows and outputs bytes; 2 M (D F + r (D + F)) FLOP"
TOLERANCE = Tolerance(
    relative=6e-3, largest=1.5e-2, reason="bfloat16 base, update and shrunk rows are each rounded, then the sum"
)


def cases(setting: Setting) -> list[Case]:
    """Every shape; the one body there is counts as the reference."""
    return [_case(name, shape) for name, shape in SHAPES.items()]


def _case(name: str, shape: Shape) -> Case:
    def make_inputs(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = (
            (shape.rows, shape.width),
            (shape.width, shape.columns),
            (shape.width, shape.rank),
            (shape.rank, shape.columns),
        )
        x, kernel, lora_a, lora_b = (
            jax.random.normal(key, of, jnp.bfloat16) for key, of in zip(keys, shapes, strict=True)
        )
        scaled = kernel * shape.width**-0.5, lora_a * shape.width**-0.5, lora_b * shape.rank**-0.5
        return (x, *scaled, jnp.arange(shape.rows) % 2 == 1)

    program = functools.partial(gated_lora, scale=SCALE)
    base, low_rank = shape.width * shape.columns, shape.rank * (shape.width + shape.columns)
    return Case(
        op="gated_lora",
        shape=name,
        rank=2,
        is_for_dry=name == "tiny",
        is_timed=not name.startswith("tiny"),
        make_inputs=make_inputs,
        programs={"reference": program},
        truth=in_float32(program),
        tolerance=TOLERANCE,
        work=Work(
            num_bytes=2 * (base + low_rank + shape.rows * (shape.width + shape.columns)),
            num_flops=2 * shape.rows * (base + low_rank),
            formula=FORMULA,
        ),
        rivals={"XLA base product": Rival(program=_base, note="no adapter")},
        # The promise of the op: what a kernel choice of XLA could break.
        same_bits={
            "rows without the gate have the bits of the base product": (
                sliced(program, slice(0, None, 2)),
                sliced(_base, slice(0, None, 2)),
            )
        },
    )


def _base(x: jax.Array, kernel: jax.Array, *_: jax.Array) -> jax.Array:
    return x @ kernel
