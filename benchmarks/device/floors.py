"""What this device can do at all, measured in the same run: memory bandwidth and the rate of its matrix units."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.device.case import Case, Tolerance, Work
from benchmarks.device.timing import Runner, Timing, abstract_sets, interleave, make_sets, repeated

COPY_ELEMENTS = 2**30
MATMUL_SIZE = 8192
DRY_ELEMENTS, DRY_SIZE = 2**10, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floors:
    """Two ceilings.

    Attributes:
        copy_gb_s: bytes read plus bytes written over time, of the negation of 2 GiB of bfloat16.
        matmul_tflop_s: 2 n^3 over time, of a bfloat16 product of n = 8192 on random data, float32 accumulation.
        copy: the timing behind the first.
        matmul: the timing behind the second.
    """

    copy_gb_s: float
    matmul_tflop_s: float
    copy: Timing
    matmul: Timing

    def floor_s(self, work: Work) -> float:
        """The longer of the two times that `work` takes at the ceilings."""
        return max(work.num_bytes / (self.copy_gb_s * 1e9), work.num_flops / (self.matmul_tflop_s * 1e12))


def measure_floors(*, is_dry: bool) -> Floors:
    """Times a copy and a matrix product."""
    elements, size = (DRY_ELEMENTS, DRY_SIZE) if is_dry else (COPY_ELEMENTS, MATMUL_SIZE)

    def vector(seed: int):
        return (jax.random.normal(jax.random.key(seed), (elements,), jnp.bfloat16),)

    def matrices(seed: int):
        keys = jax.random.split(jax.random.key(seed))
        return tuple(jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)

    copy = _case("copy", vector, lambda x: -x, Work(num_bytes=4 * elements, num_flops=0, formula="2 * 2 bytes each"))
    matmul = _case("matmul", matrices, jnp.matmul, Work(num_bytes=0, num_flops=2 * size**3, formula="2 n^3"))
    runners = {}
    for case in (copy, matmul):
        args = abstract_sets(case.make_inputs, 1)
        compiled = jax.jit(repeated(case.programs["reference"])).lower(*args).compile()
        runners[case.shape] = Runner(compiled, make_sets(case.make_inputs, 1), donates_first=False)
    timings = interleave(runners, repeats=1 if is_dry else 9)
    return Floors(
        copy_gb_s=copy.work.num_bytes / timings["copy"].median_s / 1e9,
        matmul_tflop_s=matmul.work.num_flops / timings["matmul"].median_s / 1e12,
        copy=timings["copy"],
        matmul=timings["matmul"],
    )


def _case(name: str, make_inputs, program, work: Work) -> Case:
    exact = Tolerance(relative=0.0, largest=0.0, reason="not checked")
    return Case(
        op="floor",
        shape=name,
        rank=0,
        make_inputs=make_inputs,
        programs={"reference": program},
        truth=program,
        tolerance=exact,
        work=work,
    )
