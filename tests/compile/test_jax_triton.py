"""The kernels in the Triton language compile for sm_90 at every named shape, assemble, and write pages in place.

XLA only launches these kernels, so what Triton made of them is taken from jax-triton on its way there.
"""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from idlm_jax.deviceless import compile_and_list, compile_for, h200_mesh, on_mesh
from pallas_kernels.paged_attention import jax_triton
from pallas_kernels.paged_attention.shapes import SHAPES
from tests.compile.test_paged_attention import H200_SHARED_MEMORY, write_arguments

pytestmark = pytest.mark.compile

OPTIONS = {"interpret": False, "compute_capability": 90}


class Compiled(NamedTuple):
    """A kernel as Triton hands it over."""

    name: str
    shared_memory_bytes: int
    ptx: str


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that jax-triton compiles during a test, in order."""
    library = importlib.import_module("jax_triton.triton_lib").triton_kernel_call_lib
    make, seen = library.TritonKernel, []

    def record(name, num_warps, num_ctas, shared_memory_bytes, ptx, *rest):
        seen.append(Compiled(name, shared_memory_bytes, ptx))
        return make(name, num_warps, num_ctas, shared_memory_bytes, ptx, *rest)

    monkeypatch.setattr(library, "TritonKernel", record)
    jax_triton.kernels.cache_clear()  # jax-triton compiles a kernel that it knows only once
    return seen


def spilled_bytes(ptx, folder):
    """Assembles for sm_90, with the assembler that jax brings."""
    (cuda,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    (folder / "kernel.ptx").write_text(ptx)
    command = [Path(cuda) / "bin/ptxas", "-v", "--gpu-name=sm_90a", "kernel.ptx", "--output-file=kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])


def attend(arguments, options=OPTIONS):
    return jax_triton.paged_attention(**{"visible": None} | arguments, tiles=None, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_compiles_for_sm_90_as_two_kernels(name, compiled, tmp_path):
    mesh = h200_mesh()
    _, launches = compile_and_list(mesh, attend, on_mesh(SHAPES[name].abstract(), mesh, P()))
    assert [kernel.name for kernel in compiled] == ["attend", "combine"]
    # XLA lists its own kernels only. Queries are neither padded nor moved; what may be seen is packed by small kernels.
    assert len(launches) <= 4
    assert max(kernel.shared_memory_bytes for kernel in compiled) <= H200_SHARED_MEMORY // 2  # two blocks a processor
    spilled = [spilled_bytes(kernel.ptx, tmp_path) for kernel in compiled]
    if SHAPES[name].dtype == "bfloat16":  # float32 has no tensor cores without tf32, and its tiles exceed the registers
        assert spilled == [0, 0]
        assert re.search(r"mma.*\.f32\.bf16\.bf16", compiled[0].ptx)
    else:
        assert "tf32" not in compiled[0].ptx


@pytest.mark.parametrize("name", ["8b_isd4_b8_8k", "8b_chunk256_b1_8k", "8b_isd4_b8_8k_float32"])
def test_pages_are_written_in_place_by_one_kernel(name, compiled, tmp_path):
    mesh = h200_mesh()
    arguments = write_arguments(SHAPES[name], mesh)
    program = compile_for(mesh, functools.partial(jax_triton.write_pages, **OPTIONS), *arguments, donate_argnums=0)
    assert [kernel.name for kernel in compiled] == ["write"]
    assert spilled_bytes(compiled[0].ptx, tmp_path) == 0
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == sum(each.size * each.dtype.itemsize for each in arguments[0])
    assert memory.temp_size_in_bytes == 0


def test_float32_tokens_are_rounded_to_the_nearest_bfloat16(compiled):
    mesh = h200_mesh()
    pages, new, *where = write_arguments(SHAPES["8b_isd4_b8_8k"], mesh)
    new = on_mesh([jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in new], mesh, P())
    compile_for(mesh, functools.partial(jax_triton.write_pages, **OPTIONS), pages, tuple(new), *where)
    assert set(re.findall(r"cvt\.(\w+)\.bf16", compiled[0].ptx)) == {"rn"}


def test_without_its_packages_the_body_says_what_to_install(monkeypatch):
    for package in ("triton", "jax_triton"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # importing it raises ModuleNotFoundError
            jax_triton.kernels.cache_clear()
            with pytest.raises(NotImplementedError, match=r'pip install "idlm-jax\[gpu\]"\); other bodies: reference'):
                jax.eval_shape(attend, SHAPES["8b_isd4_b1_1k"].abstract())


def test_what_the_kernels_cannot_address_is_refused():
    shape = SHAPES["8b_isd4_b1_1k"].abstract()

    def refused(**changes):
        arguments = shape | {name: jax.ShapeDtypeStruct(size, jnp.bfloat16) for name, size in changes.items()}
        return jax.eval_shape(attend, arguments)

    with pytest.raises(NotImplementedError, match=r"jax_triton body needs a head_dim of 16, .*, not 96"):
        refused(q=(1, 7, 32, 96), k_pages=(17, 8, 64, 96), v_pages=(17, 8, 64, 96))
    for page_size in (8, 48):
        pool = (17, 8, page_size, 128)
        with pytest.raises(NotImplementedError, match=f"power of two of at least 16, not {page_size}"):
            refused(k_pages=pool, v_pages=pool)
    with pytest.raises(NotImplementedError, match="has no interpreter"):
        jax.eval_shape(functools.partial(attend, options=OPTIONS | {"interpret": True}), shape)
