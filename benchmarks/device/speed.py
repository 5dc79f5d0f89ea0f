"""Speed of every body and rival of a case, interleaved, against the floor of its work."""

import concurrent.futures
import dataclasses
from concurrent.futures import Future
from typing import Any

import jax
from jax.stages import Compiled

from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.case import Case, MakeInputs, Program
from benchmarks.device.compiling import Compiler, describe
from benchmarks.device.floors import Floors
from benchmarks.device.timing import (
    REPEATS,
    Runner,
    Timing,
    abstract_sets,
    interleave,
    make_sets,
    num_sets,
    repeated,
    set_bytes,
)

# Cases that compile together, and what such a group may take; a guess, on the safe side.
GROUP = 8
GROUP_S = 45.0
END_OF_COMPILATION_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """One line of the speed table.

    Attributes:
        case: op and shape.
        program: body or rival.
        timing: of one repetition; None if it was not timed.
        gb_s: the work's bytes over the median.
        tflop_s: the work's FLOP over the median.
        of_floor: the floor over the median; 1.0 cannot be beaten, unless the inputs stay in cache.
        temp_bytes: memory beside inputs and outputs, from the compiler, of one repetition.
        sets: input sets per dispatch.
        set_bytes: bytes of one set; under the size of the cache all sets together stay in it.
        formula: of bytes and FLOP.
        note: what a rival does not do, or why a program was not timed.
    """

    case: str
    program: str
    timing: Timing | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    of_floor: float | None = None
    temp_bytes: int | None = None
    sets: int = 0
    set_bytes: int = 0
    formula: str = ""
    note: str = ""


def time_all(
    cases: list[Case], floors: Floors, compiler: Compiler, budget: Budget, *, is_dry: bool, reserve_s: float
) -> list[Speed]:
    """Times cases, the headlines first, while more than `reserve_s` of the budget is left."""
    lines: list[Speed] = []
    timed = sorted((case for case in cases if case.is_timed or is_dry), key=lambda case: case.rank)
    for start in range(0, len(timed), GROUP):
        group = timed[start : start + GROUP]
        if not budget.allows(reserve_s + GROUP_S):
            lines += [Speed(case=case.name, program=name, note=SKIPPED) for case in group for name in _programs(case)]
            continue
        # A group compiles before any of it is timed: XLA runs candidates on the device to choose among them.
        pending = [_compile(case, compiler, is_dry=is_dry) for case in group]
        everything = [future for futures in pending for future in futures.values()]
        concurrent.futures.wait(everything, timeout=max(0.0, budget.left_s - reserve_s))
        compiler.drain(END_OF_COMPILATION_S)
        for case, futures in zip(group, pending, strict=True):
            lines += _time_case(case, futures, floors, is_dry=is_dry)
    return lines


def _programs(case: Case) -> dict[str, tuple[Program, MakeInputs, str]]:
    programs = {name: (program, case.make_inputs, "") for name, program in case.programs.items()}
    for name, rival in case.rivals.items():
        programs[name] = (rival.program, rival.make_inputs or case.make_inputs, rival.note)
    return programs


def _compile(case: Case, compiler: Compiler, *, is_dry: bool) -> "dict[str, Future[Compiled]]":
    futures = {}
    for name, (program, make_inputs, _) in _programs(case).items():
        args = abstract_sets(make_inputs, num_sets(make_inputs, is_dry=is_dry))
        futures[name] = compiler.submit(repeated(program), *args, donate=case.donates_first)
    return futures


def _time_case(case: Case, futures: "dict[str, Future[Compiled]]", floors: Floors, *, is_dry: bool) -> list[Speed]:
    runners: dict[str, Runner] = {}
    notes, temp_bytes, sizes = {}, {}, {}
    shared: list[Any] | None = None
    for name, (_, make_inputs, note) in _programs(case).items():
        notes[name], sizes[name] = note, set_bytes(make_inputs)
        sets = num_sets(make_inputs, is_dry=is_dry)
        if futures[name].cancelled() or not futures[name].done():
            notes[name] = SKIPPED
            continue
        try:
            compiled = futures[name].result()
            if make_inputs is case.make_inputs:
                inputs = shared = shared or make_sets(make_inputs, sets)
            else:
                inputs = make_sets(make_inputs, sets)
            runner = Runner(compiled, inputs, donates_first=case.donates_first)
            jax.block_until_ready(runner())
        except Exception as error:  # a rival that cannot run is a result, not the end of the run
            notes[name] = describe(error)
            continue
        runners[name] = runner
        memory = compiled.memory_analysis()
        temp_bytes[name] = None if memory is None else memory.temp_size_in_bytes // sets
    try:
        timings = interleave(runners, repeats=1 if is_dry else REPEATS) if runners else {}
    except Exception as error:  # the same; out of memory shows only when outputs of several programs meet
        timings = {}
        notes |= {name: describe(error) for name in runners}
    return [
        _line(case, name, timings.get(name), floors, temp_bytes.get(name), runners.get(name), sizes, note, is_dry)
        for name, note in notes.items()
    ]


def _line(
    case: Case,
    name: str,
    timing: Timing | None,
    floors: Floors,
    temp_bytes: int | None,
    runner: Runner | None,
    sizes: dict[str, int],
    note: str,
    is_dry: bool,
) -> Speed:
    line = Speed(case=case.name, program=name, formula=case.work.formula, note=note, temp_bytes=temp_bytes)
    if timing is None or runner is None:
        return line
    line = dataclasses.replace(line, sets=runner.sets, set_bytes=sizes[name])
    if is_dry:
        return dataclasses.replace(line, note="dry")
    return dataclasses.replace(
        line,
        timing=timing,
        gb_s=case.work.num_bytes / timing.median_s / 1e9,
        tflop_s=case.work.num_flops / timing.median_s / 1e12,
        of_floor=floors.floor_s(case.work) / timing.median_s,
    )
