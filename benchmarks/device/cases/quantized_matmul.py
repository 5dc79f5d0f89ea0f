"""Products with 8-bit weights, against the same product in bfloat16."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.device.case import ONE_BF16_ROUNDING, Case, Program, Rival, Setting, Work, in_float32, sliced
from pallas_kernels.bodies import Body
from pallas_kernels.quantized_matmul import QuantizedWeight, TpuTiles, TritonTiles, quantized_matmul, reference
from pallas_kernels.quantized_matmul.shapes import SHAPES, Shape

FORMS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LAST = slice(-1, None)
HEADLINE = ("8b_gate_up_m8", "8b_down_m8")
FORMULA = "D * F of weight + 4 F of scales + 2 M (D + F) of rows and outputs bytes; 2 M D F FLOP"


def cases(setting: Setting) -> list[Case]:
    """Every shape with int8; those of the fixed decode width with fp8 too."""
    return [
        _case(setting, name, shape, form)
        for name, shape in SHAPES.items()
        for form in FORMS
        if form == "int8" or name.endswith("_m8") or name.startswith("tiny")
    ]


def _case(setting: Setting, name: str, shape: Shape, form: str) -> Case:
    def make_inputs(seed: int) -> tuple[jax.Array, QuantizedWeight]:
        keys = jax.random.split(jax.random.key(seed), 3)
        x = jax.random.normal(keys[0], (shape.rows, shape.width), jnp.bfloat16)
        values = jax.random.randint(keys[1], (shape.width, shape.columns), -127, 128, jnp.int8)
        scale = jax.random.uniform(keys[2], (shape.columns,), jnp.float32, 0.5, 2.0) / 127
        return x, QuantizedWeight(values.astype(FORMS[form]), scale)

    def make_bf16_inputs(seed: int) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(seed))
        shapes = (shape.rows, shape.width), (shape.width, shape.columns)
        x, weight = (jax.random.normal(key, of, jnp.bfloat16) for key, of in zip(keys, shapes, strict=True))
        return x, weight

    def of(body: Body, tiles: TritonTiles | TpuTiles | None = None) -> Program:
        return functools.partial(quantized_matmul, body=body, interpret=setting.is_dry, tiles=tiles)

    kernels = [body for body in setting.bodies if body is not Body.REFERENCE]
    is_tiny = name.startswith("tiny")
    rank = 3 if is_tiny else 0 if name in HEADLINE and form == "int8" else 2 if form == "fp8" else 1
    claim = "{}: a row alone has the bits it has among others"
    return Case(
        op="quantized_matmul",
        shape=name if form == "int8" else f"{name}_{form}",
        rank=rank,
        is_for_dry=name == "tiny_ragged" and form == "int8",
        is_timed=not is_tiny,
        make_inputs=make_inputs,
        programs={body.value: of(body) for body in setting.bodies},
        truth=in_float32(reference.quantized_matmul),
        tolerance=ONE_BF16_ROUNDING,
        work=Work(
            num_bytes=shape.width * shape.columns + 4 * shape.columns + 2 * shape.rows * (shape.width + shape.columns),
            num_flops=2 * shape.rows * shape.width * shape.columns,
            formula=FORMULA,
        ),
        rivals={"XLA bfloat16": Rival(program=jnp.matmul, make_inputs=make_bf16_inputs, note="weight of 2 bytes")},
        torch={
            "kind": "matmul",
            "rows": shape.rows,
            "width": shape.width,
            "columns": shape.columns,
            "set_bytes": 2 * shape.width * shape.columns,
        }
        if form == "int8"
        else None,
        same_bits={
            claim.format(body.value): (
                sliced(of(body), LAST),
                lambda x, weight, body=body: of(body)(x[-1:], weight),
            )
            for body in kernels
            if shape.rows > 1
        },
        tunings=_tunings(setting, shape, of) if form == "int8" and (shape.rows in (8, 64) or setting.is_dry) else {},
    )


def _tunings(setting: Setting, shape: Shape, of) -> dict[str, dict[str, Program]]:
    """Winners are kept per [D, F], over the row counts that were tried."""
    candidates: list[tuple[Body, TritonTiles | TpuTiles]] = []
    if setting.is_dry and Body.TRITON in setting.bodies:
        candidates = [(Body.TRITON, TritonTiles(columns=16, depth=depth)) for depth in (16, 32)]
    elif Body.TRITON in setting.bodies:
        candidates = [
            (Body.TRITON, TritonTiles(columns=columns, depth=depth, num_warps=warps, num_stages=stages))
            for columns in (32, 64, 128)
            for depth in (64, 128, 256)
            for warps, stages in ((4, 3), (4, 5), (8, 4))
        ]
    elif Body.TPU in setting.bodies:
        candidates = [
            (Body.TPU, TpuTiles(columns=columns, depth=depth))
            for columns in (512, 1024, 2048)
            for depth in (512, 1024, 2048)
        ]
    return {f"({shape.width}, {shape.columns})": {repr(tiles): of(body, tiles) for body, tiles in candidates}}
