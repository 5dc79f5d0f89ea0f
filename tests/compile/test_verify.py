"""Every kernel of the op compiles for sm_90 and for three TPU generations, at every named shape."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from idlm_jax.deviceless import compile_for, h200_mesh, on_mesh, tpu_mesh
from pallas_kernels.bodies import Body
from pallas_kernels.verify import Sampling, draft, verify
from pallas_kernels.verify.shapes import SHAPES, Shape

pytestmark = [
    pytest.mark.compile,
    # Since jax 0.11; the range in pyproject.toml ends before it can go.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
QWEN3_MASK_ID = 151_669


def draft_and_verify(proposal_logits, anchor_logits, num_proposals, sampling, first_position, **options):
    """All kernels at once: statistics, a draft, and the final draw with a q; unfiltered, also the one without."""
    proposals, stats = draft(proposal_logits, sampling, first_position, argmax=False, **options)
    check = functools.partial(verify, anchor_logits, proposals, **options)
    verdicts = [check(proposal_logits, stats, num_proposals, sampling, first_position)]
    if not options["filtered"]:
        verdicts.append(check(None, None, num_proposals, sampling, first_position))
    return proposals, verdicts


def compiled(mesh, shape: Shape, **options) -> str:
    def abstract(dtype, *dims):
        return jax.ShapeDtypeStruct((shape.requests, *dims), dtype)

    logits = (
        abstract(jnp.dtype(shape.dtype), rows, shape.vocab_size) for rows in (shape.num_masks, shape.num_masks + 1)
    )
    sampling = Sampling(abstract(jnp.float32), abstract(jnp.int32), abstract(jnp.float32), abstract(jnp.uint32))
    args = (*logits, abstract(jnp.int32), sampling, abstract(jnp.int32))
    excluded_id = QWEN3_MASK_ID if shape.vocab_size > QWEN3_MASK_ID else -1
    fn = functools.partial(draft_and_verify, excluded_id=excluded_id, **options)
    return compile_for(mesh, fn, *on_mesh(args, mesh, P())).as_text() or ""


# Of real shapes the larger program of each: filters on. `make proofs` has them plain too.
@pytest.mark.parametrize(
    ("shape", "filtered"),
    [
        pytest.param(
            shape,
            filtered,
            id=f"{name}-{'filtered' if filtered else 'plain'}",
            marks=pytest.mark.proof if name.startswith("qwen3") and not filtered else (),
        )
        for name, shape in SHAPES.items()
        for filtered in (False, True)
    ],
)
def test_kernels_compile_for_sm_90(shape, filtered):
    hlo = compiled(h200_mesh(), shape, body=Body.TRITON, filtered=filtered)
    assert "__gpu$xla.gpu.triton" in hlo


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize(
    "shape",
    # One real and one ragged shape here; `make compiled` compiles them all, in minutes.
    [
        pytest.param(shape, id=name, marks=() if name in ("qwen3_stride4_b1", "tiny_ragged") else pytest.mark.slow)
        for name, shape in SHAPES.items()
    ],
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile_for_tpu(topology, shape, filtered):
    mesh = tpu_mesh(topology, (1,), ("data",))
    hlo = compiled(mesh, shape, body=Body.TPU, filtered=filtered)
    assert "tpu_custom_call" in hlo
