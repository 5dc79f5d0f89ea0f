"""Every kernel of two-stream attention, at every named shape, compiles for sm_90 and for three kinds of TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from idlm_jax.deviceless import compile_for, h200_mesh, on_mesh, tpu_mesh
from pallas_kernels.bodies import Body
from pallas_kernels.two_stream_attention import noisy_attention, packed_causal_attention, two_stream_attention
from pallas_kernels.two_stream_attention.shapes import SHAPES, Shape

pytestmark = [
    pytest.mark.compile,
    # Known, and the reason why other bodies may stand beside this one.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

TARGETS = {
    "h200": (Body.TRITON, h200_mesh),
    **{
        name: (Body.TPU, functools.partial(tpu_mesh, topology, (1,), ("data",)))
        for name, topology in {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}.items()
    },
}
KERNELS = {"two_stream_mix", "two_stream_query_grads", "two_stream_clean_key_grads", "two_stream_noisy_key_grads"}

every_target = pytest.mark.parametrize("target", TARGETS)


def compile_both_passes(op, shape: Shape, target: str, *, num_streams: int) -> tuple[str, int]:
    """HLO and bytes of temporaries of outputs and gradients together."""
    _, make_mesh = TARGETS[target]
    rows = shape.batch, shape.length
    heads = [shape.heads, shape.kv_heads, shape.kv_heads] * num_streams
    arrays = [jax.ShapeDtypeStruct((*rows, n, shape.head_dim), shape.dtype) for n in heads]
    indices = {name: jax.ShapeDtypeStruct(rows, jnp.int32) for name in ("segment_ids", "positions", "block_start")}
    bars = (arrays[0], arrays[0]) if num_streams == 2 else arrays[0]

    def outs_and_grads(arrays, indices, bars):
        outs, vjp = jax.vjp(lambda *arrays: op(*arrays, indices), *arrays)
        return outs, vjp(bars)

    mesh = make_mesh()
    compiled = compile_for(mesh, outs_and_grads, *on_mesh((arrays, indices, bars), mesh, P()))
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled.as_text() or "", memory.temp_size_in_bytes


def two_streams(body, *arrays):
    *streams, indices = arrays
    return two_stream_attention(*streams, **indices, body=body)


# A TPU compiler takes minutes of the shapes together: one each here, the others in `make compiled`.
CASES = [
    pytest.param(name, target, marks=() if target == "h200" or name == "qwen3_8b_4k" else pytest.mark.slow)
    for name in SHAPES
    for target in TARGETS
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_forward_and_backward_compile(name, target):
    shape = SHAPES[name]
    op = functools.partial(two_streams, TARGETS[target][0])
    hlo, temporaries = compile_both_passes(op, shape, target, num_streams=2)
    for kernel in KERNELS:
        assert kernel in hlo
    # Nothing grows with the square of the length: dense scores of one stream would take B * N * L^2 * 4 bytes,
    # 2 GiB at 8B proportions. Copies of the ten arrays that a TPU wants with its heads first, and their padding.
    streams = 10 * shape.batch * (shape.length + 512) * shape.heads * max(shape.head_dim, 128) * 4
    assert temporaries < streams


@every_target
def test_a_frozen_clean_stream_leaves_its_key_gradients_out(target):
    def op(q, k, v, indices):
        # Clean keys only have to be other arrays: they are constants.
        return noisy_attention(q, k, v, 2 * k, 2 * v, **indices, body=TARGETS[target][0])

    hlo, _ = compile_both_passes(op, SHAPES["qwen3_8b_4k"], target, num_streams=1)
    assert {kernel for kernel in KERNELS if kernel in hlo} == KERNELS - {"two_stream_clean_key_grads"}


@every_target
def test_causal_attention_alone_compiles(target):
    def op(q, k, v, indices):
        return packed_causal_attention(
            q, k, v, segment_ids=indices["segment_ids"], positions=indices["positions"], body=TARGETS[target][0]
        )

    hlo, _ = compile_both_passes(op, SHAPES["qwen3_8b_4k"], target, num_streams=1)
    assert {kernel for kernel in KERNELS if kernel in hlo} == KERNELS - {"two_stream_noisy_key_grads"}
