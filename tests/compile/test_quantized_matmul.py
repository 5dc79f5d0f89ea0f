"""The quantised product compiles for an H200 and for TPUs, at every named shape; nothing runs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from idlm_jax.deviceless import compile_for, h200_mesh, on_mesh, tpu_mesh
from pallas_kernels.bodies import Body
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul
from pallas_kernels.quantized_matmul.shapes import SHAPES

pytestmark = [
    pytest.mark.compile,
    # Since jax 0.11; the range in pyproject.toml ends before it can go.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

VALUES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
MACHINES = {
    "h200": (Body.TRITON, lambda: h200_mesh()),
    "v5e": (Body.TPU, lambda: tpu_mesh("v5e:2x2", (1,), ("data",))),
    "v6e": (Body.TPU, lambda: tpu_mesh("v6e:2x2", (1,), ("data",))),
    "v5p": (Body.TPU, lambda: tpu_mesh("v5p:2x2x1", (1,), ("data",))),
}
# Every shape is compiled for int8 weights and bfloat16 rows; other dtypes for shapes that differ in kind.
CASES = [(name, "int8", jnp.bfloat16) for name in SHAPES]
CASES += [
    (name, form, dtype)
    for name in ("8b_qkv_m8", "8b_head_m64", "tiny_ragged")
    for form, dtype in (("int8", jnp.float32), ("fp8", jnp.bfloat16), ("fp8", jnp.float32))
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "form", "dtype"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_compiles_and_keeps_the_weight_in_8_bits(machine: str, name: str, form: str, dtype: jnp.dtype):
    shape = SHAPES[name]
    body, make_mesh = MACHINES[machine]
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((shape.rows, shape.width), dtype)
    weight = QuantizedWeight(
        jax.ShapeDtypeStruct((shape.width, shape.columns), VALUES[form]),
        jax.ShapeDtypeStruct((shape.columns,), jnp.float32),
    )
    args = on_mesh((x, weight), mesh, P())
    memory = compile_for(mesh, functools.partial(quantized_matmul, body=body), *args).memory_analysis()
    assert memory is not None
    # A converted copy of the weight would be twice its bytes, a padded one as many.
    assert memory.temp_size_in_bytes < shape.width * shape.columns / 2 + 2**20
