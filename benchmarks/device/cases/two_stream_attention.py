"""Training attention, forward and with its gradients, against causal attention and flex_attention."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.case import TF32, Case, Program, Rival, Setting, Tolerance, Work
from pallas_kernels.bodies import Body
from pallas_kernels.two_stream_attention import tiles as tiles_module
from pallas_kernels.two_stream_attention import two_stream_attention
from pallas_kernels.two_stream_attention.shapes import SHAPES, Shape
from pallas_kernels.two_stream_attention.tiles import PassTiles, Tiles

HEADLINE = "qwen3_8b_4k"
TUNED = (HEADLINE, "qwen3_8b_4k_packed")
DRY = "odd_blocks"
SMALL = ("tiny_qwen3_py", "odd_groups", "odd_blocks")
FORMULA = "streams, outputs (and their gradients) once; forward 4, backward 10 N H FLOP per visible pair"
TOLERANCE = Tolerance(
    relative=8e-3, largest=3e-2, reason="bfloat16 softmax weights and their cotangents enter products; results rounded"
)
FLOAT32 = Tolerance(relative=2e-5, largest=2e-4, reason="float32 products and sums, in another order")
INDICES = ("segment_ids", "positions", "block_start")


def cases(setting: Setting) -> list[Case]:
    """Every shape, forward alone and with gradients."""
    return [
        _case(setting, name, shape, has_gradients)
        for name, shape in SHAPES.items()
        for has_gradients in (False, True)
        # The gradients include the forward.
        if not setting.is_dry or (name == DRY and has_gradients)
    ]


def _case(setting: Setting, name: str, shape: Shape, has_gradients: bool) -> Case:
    dtype = jnp.dtype(shape.dtype)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads) * 2

    def make_inputs(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 8)
        streams = [
            jax.random.normal(key, (shape.batch, shape.length, count, shape.head_dim), dtype)
            for key, count in zip(keys, heads, strict=False)
        ]
        bars = [jax.random.normal(key, streams[0].shape, dtype) for key in keys[6:]] if has_gradients else []
        return (*streams, *bars, *(jnp.asarray(shape.indices()[name]) for name in INDICES))

    def of(body: Body, tiles: Tiles | None = None) -> Program:
        op = functools.partial(two_stream_attention, body=body, tiles=tiles, interpret=setting.is_dry)
        return _with_gradients(op) if has_gradients else _forward(op)

    is_float32 = dtype == jnp.float32
    streams = (2 * shape.heads + 4 * shape.kv_heads, 2 * shape.heads)  # q, k, v of both; outputs of both
    passes = 3 if has_gradients else 1  # read again for the gradients, which are as large again
    work = Work(
        num_bytes=passes * sum(streams) * shape.batch * shape.length * shape.head_dim * dtype.itemsize,
        num_flops=shape.forward_flop + has_gradients * shape.backward_flop,
        formula=FORMULA,
    )
    return Case(
        op="two_stream_attention.gradients" if has_gradients else "two_stream_attention",
        shape=name,
        rank=0 if name == HEADLINE else 3 if name in SMALL else 1,
        is_for_dry=name == DRY,
        is_timed=name not in SMALL,
        make_inputs=make_inputs,
        programs={body.value: of(body) for body in setting.bodies},
        truth=functools.partial(_truth, has_gradients=has_gradients),
        tolerance=FLOAT32 if is_float32 else TOLERANCE,
        reference_tolerance=TF32 if is_float32 else None,
        work=work,
        rivals=_rivals(setting, shape, has_gradients) if name not in SMALL else {},
        torch=_torch(shape, has_gradients),
        tunings=_tunings(setting, dtype.itemsize, of, has_gradients) if setting.is_dry or name in TUNED else {},
        table_entry=_table_entry,
    )


def _forward(op: Program) -> Program:
    def program(*inputs: jax.Array) -> Any:
        return op(*inputs[:6], **dict(zip(INDICES, inputs[6:], strict=True)))

    return program


def _with_gradients(op: Program) -> Program:
    """Outputs, and the gradients of all six streams for given cotangents of the outputs."""

    def program(*inputs: jax.Array) -> Any:
        indices = dict(zip(INDICES, inputs[8:], strict=True))
        outputs, pull_back = jax.vjp(lambda *streams: op(*streams, **indices), *inputs[:6])
        return outputs, pull_back((inputs[6], inputs[7]))

    return program


def _truth(*inputs: jax.Array, has_gradients: bool) -> Any:
    """In float32, one key head and its queries at a time: the scores of all heads would take tens of gigabytes."""
    program = _with_gradients(two_stream_attention) if has_gradients else _forward(two_stream_attention)
    num_streams = 8 if has_gradients else 6
    kv_heads = inputs[1].shape[2]

    def by_head(stream: jax.Array) -> jax.Array:
        batch, length, heads, head_dim = stream.shape
        grouped = stream.astype(jnp.float32).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        return jnp.moveaxis(grouped, 2, 0)

    def together(stream: jax.Array) -> jax.Array:
        kv_heads, batch, length, group, head_dim = stream.shape
        return jnp.moveaxis(stream, 0, 2).reshape(batch, length, kv_heads * group, head_dim)

    with jax.default_matmul_precision("highest"):
        streams = tuple(by_head(stream) for stream in inputs[:num_streams])
        outputs = jax.lax.map(lambda head: program(*head, *inputs[num_streams:]), streams)
    return jax.tree.map(together, outputs)


def _rivals(setting: Setting, shape: Shape, has_gradients: bool) -> dict[str, Rival]:
    """Plain causal attention of both streams side by side: as many visible pairs when a row is one document."""
    if shape.dtype != "bfloat16":
        return {}
    implementation = "cudnn" if Body.TRITON in setting.bodies and not setting.is_dry else "xla"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    def program(*inputs: jax.Array) -> Any:
        q, k, v = (jnp.concatenate(pair) for pair in zip(inputs[:3], inputs[3:6], strict=True))
        if not has_gradients:
            return attend(q, k, v)
        outputs, pull_back = jax.vjp(attend, q, k, v)
        return outputs, pull_back(jnp.concatenate(inputs[6:8]))

    note = "causal within each stream: another mask, nothing packed; includes stacking the streams"
    return {f"jax.nn.dot_product_attention {implementation}": Rival(program=program, note=note)}


def _torch(shape: Shape, has_gradients: bool) -> dict[str, Any] | None:
    if shape.dtype != "bfloat16":
        return None
    return {
        "kind": "two_stream",
        "batch": shape.batch,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "queries": 2 * shape.length,
        "keys": 2 * shape.length,
        "indices": {name: column[0].tolist() for name, column in shape.indices().items()},
        "backward": has_gradients,
        "set_bytes": 4 * shape.batch * shape.length * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim,
    }


def _tunings(setting: Setting, itemsize: int, of, has_gradients: bool) -> dict[str, dict[str, Program]]:
    """One pass at a time, the others as they are by default; a place names the pass and the bytes per element."""
    if setting.is_dry and Body.TRITON in setting.bodies:
        kernel, sizes, launches = Body.TRITON, ((16, 16), (16, 32)), ((4, 1),)
    elif Body.TRITON in setting.bodies:
        kernel, sizes = Body.TRITON, ((64, 32), (64, 64), (128, 32), (128, 64), (64, 128), (128, 128))
        launches = ((4, 2), (4, 3), (8, 2), (8, 3))
    elif Body.TPU in setting.bodies:
        kernel, sizes, launches = Body.TPU, ((256, 256), (256, 512), (512, 256), (512, 512), (512, 1024)), ((4, 2),)
    else:
        return {}
    table = tiles_module.TRITON if kernel is Body.TRITON else tiles_module.TPU
    default = table["default", itemsize]
    passes = ("query_grads", "key_grads") if has_gradients else ("forward",)
    tunings = {}
    for name in passes:
        candidates = [
            PassTiles(rows=rows, keys=keys, num_warps=warps, num_stages=stages)
            for rows, keys in sizes
            for warps, stages in launches
        ]
        tunings[f"{name} {itemsize}"] = {
            repr(each): of(kernel, _replaced(default, name, each, setting)) for each in candidates
        }
    return tunings


def _table_entry(kind: str, winners: Mapping[str, str]) -> str:
    """One `Tiles` per bytes of an element; a pass that was not tuned is left out, and has to be filled in."""
    of_itemsize: dict[str, list[str]] = {}
    for place, tiles in winners.items():
        name, itemsize = place.split()
        of_itemsize.setdefault(itemsize, []).append(f"    {name}={tiles},\n")
    return "\n".join(f'("{kind}", {size}): Tiles(\n{"".join(lines)}),' for size, lines in of_itemsize.items())


def _replaced(default: Tiles, name: str, tiles: PassTiles, setting: Setting) -> Tiles:
    return Tiles(
        **{
            each: tiles if each == name else getattr(default.at_most(16) if setting.is_dry else default, each)
            for each in ("forward", "query_grads", "key_grads")
        }
    )
