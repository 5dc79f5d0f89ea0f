"""Tries the candidate tiles of an op and prints the winners as they belong in its `tiles.py`."""

import concurrent.futures
import dataclasses
import math
from collections import defaultdict
from concurrent.futures import Future

import jax
from jax.stages import Compiled

from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.case import Case
from benchmarks.device.compiling import Compiler, describe
from benchmarks.device.timing import Runner, Timing, abstract_sets, interleave, make_sets, num_sets, repeated

CASE_S = 45.0
END_OF_COMPILATION_S = 30.0
REPEATS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One tile choice at one shape.

    Attributes:
        case: op and shape.
        place: where the winner belongs in `tiles.py`.
        tiles: as Python text.
        timing: None if it did not run.
        note: why not.
    """

    case: str
    place: str
    tiles: str
    timing: Timing | None = None
    note: str = ""


def tune(cases: list[Case], compiler: Compiler, budget: Budget, *, is_dry: bool) -> list[Candidate]:
    """Times every candidate of every case that time allows, the candidates of a case interleaved."""
    lines: list[Candidate] = []
    for case in sorted(cases, key=lambda case: case.rank):
        for place, candidates in case.tunings.items():
            if not budget.allows(CASE_S):
                lines += [Candidate(case=case.name, place=place, tiles=tiles, note=SKIPPED) for tiles in candidates]
                continue
            args = abstract_sets(case.make_inputs, sets := num_sets(case.make_inputs, is_dry=is_dry))
            futures = {
                tiles: compiler.submit(repeated(program), *args, donate=case.donates_first)
                for tiles, program in candidates.items()
            }
            lines += _time_candidates(case, place, futures, sets, compiler, budget, is_dry=is_dry)
    return lines


def _time_candidates(
    case: Case,
    place: str,
    futures: "dict[str, Future[Compiled]]",
    sets: int,
    compiler: Compiler,
    budget: Budget,
    *,
    is_dry: bool,
) -> list[Candidate]:
    runners, notes = {}, {}
    concurrent.futures.wait(futures.values(), timeout=budget.left_s)
    compiler.drain(END_OF_COMPILATION_S)
    inputs = make_sets(case.make_inputs, sets)
    for tiles, future in futures.items():
        if future.cancelled() or not future.done():
            notes[tiles] = SKIPPED
            continue
        try:
            runner = Runner(future.result(), inputs, donates_first=case.donates_first)
            jax.block_until_ready(runner())
            runners[tiles] = runner
        except Exception as error:  # tiles that do not fit are a result
            notes[tiles] = describe(error)
    timings = interleave(runners, repeats=1 if is_dry else REPEATS)
    return [
        Candidate(
            case=case.name,
            place=place,
            tiles=tiles,
            timing=None if is_dry else timings.get(tiles),
            note="dry" if is_dry and tiles in timings else notes.get(tiles, ""),
        )
        for tiles in futures
    ]


def winners(candidates: list[Candidate]) -> dict[str, str]:
    """Per place, the tiles of the smallest geometric mean of time over its shapes; what failed at one is out."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    shapes: dict[str, set[str]] = defaultdict(set)
    for line in candidates:
        if line.note != SKIPPED:
            shapes[line.place].add(line.case)
        if line.timing is not None:
            times[line.place][line.tiles].append(math.log(line.timing.median_s))
    best = {}
    for place, of_tiles in times.items():
        complete = {tiles: logs for tiles, logs in of_tiles.items() if len(logs) == len(shapes[place])}
        if complete:
            best[place] = min(complete, key=lambda tiles: sum(complete[tiles]))
    return best
