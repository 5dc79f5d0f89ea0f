"""Every named shape compiles for sm_90 and for three kinds of TPU, and pages are written in place."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from idlm_jax.deviceless import compile_and_list, compile_for, h200_mesh, on_mesh, tpu_mesh
from pallas_kernels.bodies import Body
from pallas_kernels.paged_attention import paged_attention, write_pages
from pallas_kernels.paged_attention.shapes import SHAPES

pytestmark = pytest.mark.compile

TPUS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
H200_SHARED_MEMORY = 232_448  # bytes that one block may have


def attend(body, arguments):
    return paged_attention(**arguments, body=body)


def new_tokens(shape):
    return (
        jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.kv_heads, shape.head_dim), jnp.dtype(shape.dtype)),
    ) * 2


def write_arguments(shape, mesh):
    arguments = shape.abstract()
    pages = arguments["k_pages"], arguments["v_pages"]
    return on_mesh((pages, new_tokens(shape), arguments["page_table"], arguments["context_len"]), mesh, P())


@pytest.mark.parametrize("name", SHAPES)
def test_attention_compiles_for_sm_90_as_two_kernels(name):
    mesh = h200_mesh()
    _, kernels = compile_and_list(
        mesh, functools.partial(attend, Body.TRITON), on_mesh(SHAPES[name].abstract(), mesh, P())
    )
    ours = [kernel for kernel in kernels if kernel.name.startswith("paged_attention")]
    assert [kernel.name for kernel in ours] == ["paged_attention", "paged_attention_combine"]
    # Queries are neither padded nor moved; what may be seen is packed into bits by small kernels.
    assert len(kernels) <= 6
    assert max(kernel.shared_memory_bytes for kernel in ours) <= H200_SHARED_MEMORY // 2  # two blocks fit a processor


@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_compiles_for_tpu(name, topology):
    mesh = tpu_mesh(topology, (1,), ("data",))
    compiled = compile_for(mesh, functools.partial(attend, Body.TPU), on_mesh(SHAPES[name].abstract(), mesh, P()))
    assert "tpu_custom_call" in (compiled.as_text() or "")


@pytest.mark.parametrize("name", ["8b_isd4_b8_8k", "8b_chunk256_b1_8k", "8b_isd4_b8_8k_float32"])
@pytest.mark.parametrize("target", ["h200", *TPUS])
def test_pages_are_written_in_place(target, name):
    mesh = h200_mesh() if target == "h200" else tpu_mesh(target, (1,), ("data",))
    body = Body.TRITON if target == "h200" else Body.TPU
    arguments = write_arguments(SHAPES[name], mesh)
    compiled = compile_for(mesh, functools.partial(write_pages, body=body), *arguments, donate_argnums=0)
    memory = compiled.memory_analysis()
    assert memory is not None
    pool = sum(each.size * each.dtype.itemsize for each in arguments[0])
    assert memory.alias_size_in_bytes == pool
    # The TPU body takes the new tokens head by head, so they are transposed first.
    assert memory.temp_size_in_bytes <= sum(each.size * each.dtype.itemsize for each in arguments[1]) + 2**20
