"""Attention over pages and the writes into them, against contiguous attention."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.case import TF32, Case, Program, Rival, Setting, Tolerance, Work, in_float32, sliced
from pallas_kernels.bodies import Body
from pallas_kernels.paged_attention import paged_attention, write_pages
from pallas_kernels.paged_attention.shapes import SHAPES, Shape
from pallas_kernels.paged_attention.tiles import TpuTiles, TritonTiles

LAST = slice(-1, None)
HEADLINE = ("8b_isd4_b1_8k", "8b_isd4_b8_8k")
FORMULA = "keys and values of every slot in use once, queries and outputs; 4 B T N H FLOP per slot"
WRITE_FORMULA = "keys and values of the new tokens, read once and written once"
TOLERANCE = Tolerance(
    relative=6e-3,
    largest=2e-2,
    reason="bfloat16 weights of the softmax in the second product, and the result is rounded",
)
FLOAT32 = Tolerance(relative=1e-5, largest=1e-4, reason="float32 products and sums, in another order")
TUNED = (*HEADLINE, "8b_isd4_b1_32k", "8b_isd4_b64_8k")
WRITES = ("8b_isd4_b8_8k", "8b_isd4_b64_8k")
# The only one small enough for an interpreter; a real shape has thousands of slots.
DRY = Shape(batch=2, tokens=3, heads=4, kv_heads=2, head_dim=16, page_size=16, capacity=64, context_len=21)


def cases(setting: Setting) -> list[Case]:
    """Attention at every shape, writes at two."""
    shapes = {"dry": DRY} if setting.is_dry else SHAPES
    writes = {name: shape for name, shape in shapes.items() if name in (*WRITES, "dry")}
    attention = [_attention(setting, name, shape) for name, shape in shapes.items()]
    return attention + [_writes(setting, name, shape) for name, shape in writes.items()]


def _attention(setting: Setting, name: str, shape: Shape) -> Case:
    names = tuple(shape.abstract())

    def make_inputs(seed: int) -> tuple[Any, ...]:
        arguments = shape.arguments(seed)
        return tuple(arguments[name] for name in names)

    def of(body: Body, tiles: TritonTiles | TpuTiles | None = None) -> Program:
        return functools.partial(paged_attention, body=body, interpret=setting.is_dry, tiles=tiles)

    def truth(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, *rest: jax.Array) -> Any:
        # Pages behind the context would only take memory.
        in_use = -(-(shape.context_len + shape.tokens) // shape.page_size)
        return in_float32(paged_attention)(q, k_pages, v_pages, page_table[:, :in_use], *rest)

    def alone(body: Body, q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *rest: jax.Array) -> Any:
        return of(body)(q[-1:], k_pages, v_pages, *(array[-1:] for array in rest))

    is_float32 = shape.dtype == "float32"
    kernels = [body for body in setting.bodies if body is not Body.REFERENCE]
    return Case(
        op="paged_attention",
        shape=name,
        rank=0 if name in HEADLINE else 1,
        is_for_dry=setting.is_dry,
        make_inputs=make_inputs,
        programs={body.value: of(body) for body in (*setting.bodies, *_also(setting))},
        truth=truth,
        tolerance=FLOAT32 if is_float32 else TOLERANCE,
        reference_tolerance=TF32 if is_float32 else None,
        work=Work(num_bytes=shape.num_bytes, num_flops=shape.num_flops, formula=FORMULA),
        rivals=_rivals(setting, shape),
        torch=_torch(shape) if shape.dtype == "bfloat16" and not shape.is_tree else None,
        same_bits={
            f"{body.value}: a request alone has the bits it has in its batch": (
                sliced(of(body), LAST),
                functools.partial(alone, body),
            )
            for body in kernels
            if shape.batch > 1
        },
        tunings=_tunings(setting, of) if setting.is_dry or name in TUNED else {},
    )


def _also(setting: Setting) -> tuple[Body, ...]:
    """The Triton-language body, where its packages are; it has no interpreter."""
    has_packages = all(importlib.util.find_spec(name) for name in ("jax_triton", "triton"))
    return (Body.JAX_TRITON,) if Body.TRITON in setting.bodies and has_packages and not setting.is_dry else ()


def _rivals(setting: Setting, shape: Shape) -> dict[str, Rival]:
    """Keys that lie in one piece, all of them visible to every row: no pages, no mask."""
    if shape.dtype != "bfloat16":
        return {}
    slots = shape.context_len + shape.tokens
    implementation = "cudnn" if Body.TRITON in setting.bodies and not setting.is_dry else "xla"

    def make_inputs(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 3)
        rows = (shape.tokens, shape.heads), (slots, shape.kv_heads), (slots, shape.kv_heads)
        return tuple(
            jax.random.normal(key, (shape.batch, *of, shape.head_dim), jnp.bfloat16)
            for key, of in zip(keys, rows, strict=True)
        )

    program = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    note = "contiguous keys, no mask"
    return {
        f"jax.nn.dot_product_attention {implementation}": Rival(program=program, make_inputs=make_inputs, note=note)
    }


def _torch(shape: Shape) -> dict[str, Any]:
    return {
        "kind": "attention",
        "batch": shape.batch,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "queries": shape.tokens,
        "keys": shape.context_len + shape.tokens,
        "is_causal": False,
        "backward": False,
        "set_bytes": shape.num_bytes,
    }


def _tunings(setting: Setting, of) -> dict[str, dict[str, Program]]:
    """One choice per kind of device: `split` fixes the order of summation for every shape alike."""
    candidates: list[tuple[Body, TritonTiles | TpuTiles]] = []
    if setting.is_dry and Body.TRITON in setting.bodies:
        candidates = [(Body.TRITON, TritonTiles(rows=16, keys=16, split=split)) for split in (16, 32)]
    elif Body.TRITON in setting.bodies:
        candidates = [
            (Body.TRITON, TritonTiles(keys=keys, split=split, num_warps=warps, num_stages=stages))
            for keys in (32, 64, 128)
            for split in (512, 1024)
            for warps, stages in ((4, 2), (4, 3), (8, 2))
        ]
    elif Body.TPU in setting.bodies:
        candidates = [(Body.TPU, TpuTiles(pages_per_step=pages)) for pages in (2, 4, 8, 16)]
    return {"": {repr(tiles): of(body, tiles) for body, tiles in candidates}}


def _writes(setting: Setting, name: str, shape: Shape) -> Case:
    new_shape = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)

    def make_inputs(seed: int) -> tuple[Any, ...]:
        arguments = shape.arguments(seed)
        keys = jax.random.split(jax.random.key(seed + 1000))
        new = tuple(jax.random.normal(key, new_shape, jnp.dtype(shape.dtype)) for key in keys)
        pages = arguments["k_pages"], arguments["v_pages"]
        return pages, new, arguments["page_table"], arguments["context_len"]

    def of(body: Body) -> Program:
        return functools.partial(write_pages, body=body, interpret=setting.is_dry)

    token_bytes = 2 * shape.batch * shape.tokens * shape.kv_heads * shape.head_dim * jnp.dtype(shape.dtype).itemsize
    return Case(
        op="paged_attention.write_pages",
        shape=name,
        rank=2,
        is_for_dry=setting.is_dry,
        make_inputs=make_inputs,
        programs={body.value: of(body) for body in setting.bodies},
        truth=write_pages,
        tolerance=Tolerance(relative=0.0, largest=0.0, reason="a copy"),
        work=Work(num_bytes=2 * token_bytes, num_flops=0, formula=WRITE_FORMULA),
        donates_first=True,
    )
