"""Correctness on the device: every body of a case against float32, twice, and its bitwise claims."""

import concurrent.futures
import dataclasses
import math
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.case import Case, Tolerance
from benchmarks.device.compiling import Compiler, abstract, describe

# A body that says in its contract that it cannot do a shape refuses it; that is no failure.
PASS, FAIL, REFUSED = "pass", "FAIL", "refused"
# A case that cannot start this long before the end is skipped.
CASE_S = 15.0
# Running them all takes less; what has not compiled by then is skipped.
RUNNING_S = 60.0
END_OF_COMPILATION_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the correctness table.

    Attributes:
        case: op and shape.
        program: body, or a bitwise claim.
        status: pass, FAIL, refused, or skipped (time).
        max_abs: largest absolute difference from the truth, over all outputs.
        relative: largest |out - truth| / |truth| of an output; see `Tolerance`.
        allowed: the tolerance.
        reason: of the tolerance.
        problem: why it failed.
    """

    case: str
    program: str
    status: str
    max_abs: float | None = None
    relative: float | None = None
    allowed: str = ""
    reason: str = ""
    problem: str = ""


@jax.jit
def same_bits(one: Any, other: Any) -> jax.Array:
    """Whether two pytrees agree in every bit, NaN included."""

    def bits(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))

    equal = jax.tree.map(lambda a, b: jnp.all(bits(a) == bits(b)), one, other)
    return jnp.all(jnp.stack(jax.tree.leaves(equal)))


@jax.jit
def _distances(out: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest |out - truth|, and the norm and the maximum of the difference over those of the truth."""
    out, truth = out.astype(jnp.float32), truth.astype(jnp.float32)
    is_number = jnp.isfinite(truth)
    # Where the truth is infinite nothing else will do. NaN becomes infinitely far, so that it survives a maximum.
    error = jnp.where(is_number, jnp.abs(out - truth), jnp.where(out == truth, 0.0, jnp.inf))
    error = jnp.where(jnp.isnan(error), jnp.inf, error)
    size = jnp.where(is_number, jnp.abs(truth), 0.0)
    tiny = jnp.finfo(jnp.float32).tiny
    norm = jnp.linalg.norm(error.ravel()) / jnp.maximum(jnp.linalg.norm(size.ravel()), tiny)
    return (
        jnp.max(error, initial=0.0),
        norm,
        jnp.max(error, initial=0.0) / jnp.maximum(jnp.max(size, initial=0.0), tiny),
    )


def compare(out: Any, truth: Any, tolerance: Tolerance) -> tuple[float, float, str]:
    """(max |out - truth|, largest relative norm, what is wrong or "") over all leaves."""
    problems, max_abs, relative = [], 0.0, 0.0
    leaves, expected = jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(truth)
    if len(leaves) != len(expected):
        return jnp.inf, jnp.inf, f"{len(leaves)} outputs, but the truth has {len(expected)}"
    for (path, leaf), want in zip(leaves, expected, strict=True):
        name = jax.tree_util.keystr(path) or "output"
        if leaf.shape != want.shape:
            problems.append(f"{name}: shape {leaf.shape}, not {want.shape}")
        elif jnp.issubdtype(want.dtype, jnp.floating):
            far, norm, largest = (float(value) for value in _distances(leaf, want))
            max_abs, relative = max(max_abs, far), max(relative, norm)
            if not (norm <= tolerance.relative and largest <= tolerance.largest):
                problems.append(f"{name}: relative {norm:.2e}, largest {largest:.2e}")
        else:
            share = float(jnp.mean((leaf != want).astype(jnp.float32))) if leaf.size else 0.0
            if share > tolerance.mismatches:
                problems.append(f"{name}: {share:.1%} of the integers differ")
    return max_abs, relative, "; ".join(problems)


def check_all(cases: list[Case], compiler: Compiler, budget: Budget, *, reserve_s: float) -> list[Check]:
    """Runs every check that leaves `reserve_s` of the time; a failed one does not stop the rest."""
    jobs = []
    for case in cases:
        programs = {**case.programs, "truth": case.truth}
        programs |= {f"{claim} {side}": pair[side] for claim, pair in case.same_bits.items() for side in (0, 1)}
        try:
            args = abstract(case.make_inputs)
        except Exception as error:  # recorded, and the run fails at its end
            jobs.append((case, {}, describe(error)))
            continue
        donating = case.programs if case.donates_first else {}
        futures = {name: compiler.submit(program, *args, donate=name in donating) for name, program in programs.items()}
        jobs.append((case, futures, ""))
    within = Budget(budget.total_s - reserve_s, budget.started_s)
    # Everything compiles before anything runs: XLA times its candidates on the device, remembers the best for the whole
    # process, and must not do so beside other work.
    everything = [future for _, futures, _ in jobs for future in futures.values()]
    concurrent.futures.wait(everything, timeout=max(0.0, within.left_s - RUNNING_S))
    compiler.drain(END_OF_COMPILATION_S)
    return [check for case, futures, problem in jobs for check in _check_case(case, futures, problem, within)]


def _check_case(case: Case, futures: "dict[str, Future[Compiled]]", problem: str, budget: Budget) -> list[Check]:
    names = [*case.programs, *case.same_bits]
    if problem:
        return [Check(case=case.name, program=name, status=FAIL, problem=problem) for name in names]
    if not budget.allows(CASE_S):
        return [Check(case=case.name, program=name, status=SKIPPED) for name in names]
    try:
        inputs = case.make_inputs(0)
        truth = _compiled(futures["truth"])(*inputs)
    except Exception as error:  # recorded, and the run fails at its end
        return [_failed(case, name, error) for name in names]
    checks = []
    for name in case.programs:
        try:
            checks.append(_check_program(case, name, _compiled(futures[name]), inputs, truth))
        except Exception as error:  # the same
            checks.append(_failed(case, name, error))
    for claim in case.same_bits:
        try:
            one, other = (_compiled(futures[f"{claim} {side}"])(*inputs) for side in (0, 1))
            holds = bool(same_bits(one, other))
            status, problem = (PASS, "") if holds else (FAIL, "the bits differ")
            checks.append(Check(case=case.name, program=claim, status=status, allowed="bitwise", problem=problem))
        except Exception as error:  # the same
            checks.append(_failed(case, claim, error))
    return checks


def _compiled(future: "Future[Compiled]") -> Compiled:
    """The program; a late one raises TimeoutError or CancelledError."""
    return future.result(timeout=0.0)


def _check_program(case: Case, name: str, compiled: Compiled, inputs: tuple[Any, ...], truth: Any) -> Check:
    def run() -> Any:
        # A donated input is gone after the call, so each call gets its own.
        first = jax.tree.map(jnp.copy, inputs[0]) if case.donates_first else inputs[0]
        return compiled(first, *inputs[1:])

    out = run()
    tolerance = case.tolerance_of(name)
    max_abs, relative, problem = compare(out, truth, tolerance)
    problems = [problem] if problem else []
    if not bool(same_bits(out, run())):
        problems.append("two runs differ")
    memory = compiled.memory_analysis()
    first_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs[0]))
    if case.donates_first and memory is not None and memory.alias_size_in_bytes < first_bytes:
        problems.append(f"{memory.alias_size_in_bytes} of {first_bytes} donated bytes are reused: the rest is copied")
    return Check(
        case=case.name,
        program=name,
        status=FAIL if problems else PASS,
        # JSON has no infinity; `problem` tells it.
        max_abs=max_abs if math.isfinite(max_abs) else None,
        relative=relative if math.isfinite(relative) else None,
        allowed=f"relative {tolerance.relative:g}, largest {tolerance.largest:g}",
        reason=tolerance.reason,
        problem="; ".join(problems),
    )


def _failed(case: Case, name: str, error: BaseException) -> Check:
    if isinstance(error, TimeoutError | concurrent.futures.CancelledError):
        return Check(case=case.name, program=name, status=SKIPPED)
    # Lowering raises the same class for what it cannot translate; only `bodies.refuse` names other bodies.
    is_refusal = isinstance(error, NotImplementedError) and "other bodies:" in str(error)
    return Check(case=case.name, program=name, status=REFUSED if is_refusal else FAIL, problem=describe(error))
