"""A decode step of Qwen3-8B compiles for one chip and copies neither KV pool nor weights. Training: test_plan.py."""

import math
import re
from pathlib import Path

import pytest

from idlm_jax.deviceless import h200_mesh, tpu_mesh
from tests.compile.programs import compile_decode_step, pool_bytes

pytestmark = pytest.mark.compile

# Of cuBLASLt, which multiplies by weights in bfloat16, and by the head.
WORKSPACE = 33_600_000
# A slice that is copied out of the stack of all layers, beside the main stream; and any slice of a layer.
COPIED_SLICE = re.compile(r"\), \w+\[([\d,]+)\]\S*, u32\[\]\) fusion-start\(")
LAYER_SLICE = re.compile(r"= bf16\[(1,[\d,]+)\]\S* dynamic-slice\([^\n]*")
THUNK = re.compile(r"^\s*\d+: (k\w+)", re.MULTILINE)


@pytest.mark.parametrize(
    ("batch", "pool_tokens", "options"),
    [
        (1, 32_832, {}),
        (1, 32_832, {"num_masks": 0}),  # AR, whose products have one row
        (1, 32_832, {"rows": 7}),
        (1, 32_832, {"quantize": "int8"}),
        pytest.param(1, 32_832, {"quantize": "int8", "num_masks": 0}, marks=pytest.mark.proof),
        pytest.param(1, 32_832, {"quantize": "fp8"}, marks=pytest.mark.proof),
        pytest.param(8, 131_072, {}, marks=pytest.mark.proof),
        (64, 524_288, {"markov_rank": 256}),
        pytest.param(64, 524_288, {}, marks=pytest.mark.proof),
        pytest.param(1, 32_832, {"markov_rank": 256}, marks=pytest.mark.proof),
    ],
    ids=str,
)
def test_decode_step_at_32k_compiles_for_an_h200(batch, pool_tokens, options, tmp_path):
    compiled, state = compile_decode_step(
        h200_mesh(), kernels="triton", batch=batch, pool_tokens=pool_tokens, dump=str(tmp_path), **options
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    # Token buffers of the state are donated too.
    assert pool_bytes(state) <= memory.alias_size_in_bytes
    # 9 MB a request: float32 logits of 7 rows, twice, as anchors and MASKs are set apart; a Markov head corrects three
    # rows. A layer has 386 MB of weights.
    a_request = 9_000_000 + (2_000_000 if "markov_rank" in options else 0)
    assert memory.temp_size_in_bytes < WORKSPACE + a_request * batch
    hlo = compiled.as_text() or ""
    # Weights are read where they lie: of a layer's parameters, none but norms is copied.
    copied = [math.prod(map(int, shape.split(","))) for shape in COPIED_SLICE.findall(hlo)]
    assert all(size <= 4096 for size in copied)
    assert copied or options.get("num_masks") == 0  # the pattern still finds those of norms
    # The host waits for nothing: it knows where each layer's slice lies and how many layers there are, and nothing else
    # branches or calls.
    slices = [each.group() for each in LAYER_SLICE.finditer(hlo) if math.prod(map(int, each[1].split(","))) > 4096]
    assert all('"dynamic_slice_config":{"loop_index":"0"' in each for each in slices)
    assert slices or "quantize" in options  # whose kernels read the stacks whole
    assert len(re.findall(r" while\(.*\"known_trip_count\":\{\"n\":\"36\"\}", hlo)) == hlo.count(" while(") == 1
    assert not re.search(r" (infeed|outfeed|send|recv|conditional)\(|callback", hlo)
    (sequence,) = Path(tmp_path).glob("*.thunk_sequence.txt")
    kinds = set(THUNK.findall(sequence.read_text()))
    slicing = {"kAsyncStart", "kAsyncDone", "kDynamicSliceFusion"}
    assert kinds <= {"kCopy", "kCustomKernel", "kWhile", "kCublasLtMatmul"} | slicing


@pytest.mark.parametrize(
    ("topology", "batch", "pool_tokens", "options"),
    [
        ("v6e:2x2", 1, 32_832, {"markov_rank": 256}),
        pytest.param("v6e:2x2", 1, 32_832, {}, marks=pytest.mark.proof),
        pytest.param("v6e:2x2", 1, 32_832, {"rows": 7}, marks=pytest.mark.proof),
        ("v6e:2x2", 1, 32_832, {"quantize": "int8"}),
        pytest.param("v5p:2x2x1", 1, 32_832, {"quantize": "fp8"}, marks=pytest.mark.proof),
        pytest.param("v6e:2x2", 8, 65_536, {}, marks=pytest.mark.proof),
        ("v5p:2x2x1", 64, 262_144, {}),
        pytest.param("v5p:2x2x1", 64, 262_144, {"markov_rank": 256}, marks=pytest.mark.proof),
    ],
    ids=str,
)
def test_decode_step_at_32k_compiles_for_one_tpu_chip(topology, batch, pool_tokens, options):
    mesh = tpu_mesh(topology, (1,), ("data",))
    compiled, state = compile_decode_step(mesh, kernels="tpu", batch=batch, pool_tokens=pool_tokens, **options)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert pool_bytes(state) <= memory.alias_size_in_bytes
    # 906 MB more if the values of q, k and v had heads as an axis.
    assert memory.temp_size_in_bytes < 40_000_000 + 12_000_000 * batch
