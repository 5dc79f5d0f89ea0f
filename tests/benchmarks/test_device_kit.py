"""The device kit on a CPU: its dry run, its verdicts, its arithmetic. What it measures needs an accelerator."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.device import torch_rivals
from benchmarks.device.__main__ import main
from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.case import Case, Tolerance, Work, entry_per_kind, setting_of
from benchmarks.device.cases import OPS, cases_of
from benchmarks.device.cases.two_stream_attention import _table_entry
from benchmarks.device.checks import FAIL, PASS, REFUSED, check_all
from benchmarks.device.compiling import Compiler
from benchmarks.device.floors import Floors
from benchmarks.device.speed import _line, time_all
from benchmarks.device.timing import Runner, Timing, interleave, summarise
from benchmarks.device.tuning import Candidate, tune, winners
from pallas_kernels.bodies import Body, refuse
from pallas_kernels.quantized_matmul import TritonTiles
from pallas_kernels.two_stream_attention.tiles import PassTiles, Tiles

ROOT = Path(__file__).parents[2]
AMPLE = 600.0


def make_inputs(seed: int):
    return (jax.random.normal(jax.random.key(seed), (4, 8)), jnp.arange(4))


def double(x, ids):
    return {"x": 2 * x, "ids": ids}


def case_of(program=double, **fields) -> Case:
    options = {
        "op": "double",
        "shape": "tiny",
        "rank": 0,
        "make_inputs": make_inputs,
        "programs": {"reference": program},
        "truth": double,
        "tolerance": Tolerance(relative=1e-6, largest=1e-6, reason="exact"),
        "work": Work(num_bytes=4_000_000, num_flops=8_000_000, formula="none"),
    }
    return Case(**(options | fields))


def check(*cases: Case, seconds: float = AMPLE):
    compiler = Compiler()
    checks = check_all(list(cases), compiler, Budget(seconds), reserve_s=0.0)
    assert not compiler.close()
    return checks


def floors(copy_gb_s=4000.0, matmul_tflop_s=800.0) -> Floors:
    nothing = Timing(median_s=1.0, iqr_s=0.0, samples=1)
    return Floors(copy_gb_s=copy_gb_s, matmul_tflop_s=matmul_tflop_s, copy=nothing, matmul=nothing)


def test_a_failed_check_is_the_exit_status_and_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def cases(op, setting):
        return [case_of(lambda x, ids: double(3 * x, ids), shape="wrong", is_for_dry=True), case_of(is_for_dry=True)]

    monkeypatch.setattr("benchmarks.device.__main__.cases_of", cases)
    assert main(["kernels", "--dry", "--only", "verify", "--out", str(tmp_path)]) == 1
    assert "FAIL double/wrong reference" in capsys.readouterr().out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [line["status"] for line in result["checks"]] == [FAIL, PASS]
    assert len(result["speeds"]) == 2


# Verdicts


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (lambda x, ids: double(1.001 * x, ids), r"['x']: relative 1.0"),
        (lambda x, ids: double(x.at[0, 0].set(jnp.nan), ids), "inf"),
        (lambda x, ids: double(x, ids.at[2].set(7)), r"['ids']: 25.0% of the integers differ"),
        (lambda x, ids: double(x[:3], ids), "shape (3, 8), not (4, 8)"),
        (lambda x, ids: 2 * x, "1 outputs, but the truth has 2"),
        (lambda x, ids: x.reshape(5), "reshape"),
    ],
)
def test_wrong_results_and_errors_are_told(program, problem):
    (wrong,), (right,) = check(case_of(program))[:1], check(case_of())
    assert wrong.status == FAIL
    assert problem in wrong.problem
    assert right.status == PASS
    assert right.max_abs == 0


def test_a_refusal_is_no_failure_but_an_error_of_the_same_class_is():
    def refusing(x, ids):
        raise refuse("double", Body.TPU, "needs more rows", tuple(Body))

    def unimplemented(x, ids):
        raise NotImplementedError("primitive slice")

    checks = check(case_of(programs={"tpu": refusing, "triton": unimplemented, "reference": double}))
    assert [line.status for line in checks] == [REFUSED, FAIL, PASS]
    assert "needs more rows" in checks[0].problem


def test_infinite_truth_wants_the_same_infinity():
    def with_infinity(sign):
        return lambda x, ids: double(x.at[0, 0].set(sign * jnp.inf), ids)

    assert check(case_of(with_infinity(1), truth=with_infinity(1)))[0].status == PASS
    assert check(case_of(with_infinity(-1), truth=with_infinity(1)))[0].status == FAIL


def test_claims_of_equal_bits_see_the_last_bit():
    def nearly(x, ids):
        return double(x.at[0, 0].set(jnp.nextafter(x[0, 0], jnp.inf)), ids)

    fine, broken = check(case_of(same_bits={"equal": (double, double), "unequal": (double, nearly)}))[1:]
    assert (fine.program, fine.status) == ("equal", PASS)
    assert (broken.program, broken.status, broken.problem) == ("unequal", FAIL, "the bits differ")


def test_results_that_change_between_runs_fail():
    state = iter(range(100))
    program = lambda x, ids: double(  # noqa: E731
        x + 1e-8 * jax.pure_callback(lambda: jnp.float32(next(state)), jax.ShapeDtypeStruct((), jnp.float32)), ids
    )
    tolerance = Tolerance(relative=1e-3, largest=1e-3, reason="loose")
    (result,) = check(case_of(program, tolerance=tolerance))
    assert (result.status, result.problem) == (FAIL, "two runs differ")


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_donated_input_that_is_copied_fails():
    def pair(seed):
        return (jnp.full((64,), float(seed)), jnp.arange(64.0))

    in_place = lambda x, y: x + y  # noqa: E731
    copied = lambda x, y: (x + y)[:63]  # noqa: E731
    options = {"make_inputs": pair, "donates_first": True}
    assert check(case_of(in_place, truth=in_place, **options))[0].status == PASS
    (result,) = check(case_of(copied, truth=copied, **options))
    assert "the rest is copied" in result.problem


# Time


def test_what_does_not_fit_the_budget_is_skipped_and_said():
    case = case_of(same_bits={"equal": (double, double)}, tunings={"": {"a": double}})
    assert [line.status for line in check(case, seconds=0.0)] == [SKIPPED] * 2
    compiler, spent = Compiler(), Budget(0.0)
    lines = time_all([case], floors(), compiler, spent, is_dry=False, reserve_s=0.0)
    assert [line.note for line in lines] == [SKIPPED]
    assert [line.note for line in tune([case], compiler, spent, is_dry=False)] == [SKIPPED]
    assert torch_rivals.run_in_subprocess([], 0.0)[0]["note"] in (SKIPPED, "torch is not installed")
    compiler.close()


def test_rivals_that_cannot_run_are_a_line_of_their_own():
    rival = dataclasses.replace(case_of(), rivals={})
    broken = {"broken": type("R", (), {"program": lambda x, ids: x.reshape(5), "make_inputs": None, "note": ""})}
    compiler = Compiler()
    lines = time_all(
        [dataclasses.replace(rival, rivals=broken)], floors(), compiler, Budget(AMPLE), is_dry=True, reserve_s=0.0
    )
    assert [(line.program, line.note[:9]) for line in lines] == [("reference", "dry"), ("broken", "TypeError")]
    compiler.close()


def test_figures_follow_from_median_work_and_floors():
    class Two:
        sets = 2

    timing = summarise([3e-6, 1e-6, 2e-6, 4e-6, 5e-6])
    assert timing == Timing(median_s=3e-6, iqr_s=pytest.approx(2e-6), samples=5)
    line = _line(case_of(), "reference", timing, floors(), 0, Two(), {"reference": 10}, "", False)
    assert line.gb_s == pytest.approx(4e6 / 3e-6 / 1e9)
    assert line.tflop_s == pytest.approx(8e6 / 3e-6 / 1e12)
    # 1 us of bytes at 4 TB/s outlasts 10 ns of FLOP at 800 TFLOP/s.
    assert line.of_floor == pytest.approx(1 / 3)


def test_samples_are_interleaved_and_donated_state_moves_on():
    calls = []

    def compiled(name):
        def run(firsts, others):
            calls.append(name)
            return [first + 1 for first in firsts]

        return run

    inputs = [(jnp.zeros(2),), (jnp.zeros(2),)]
    moving = Runner(compiled("a"), inputs, donates_first=True)
    still = Runner(compiled("b"), inputs, donates_first=False)
    timings = interleave({"a": moving, "b": still}, repeats=3)
    assert timings.keys() == {"a", "b"}
    assert timings["a"].samples == 3
    changes = sum(one != other for one, other in itertools.pairwise(calls))
    assert changes >= 2 * 3
    assert moving()[0][0] == calls.count("a")
    assert still()[0][0] == 1


# Tiles


def candidate(tiles: str, shape: str, median_s: float | None, place: str = "p") -> Candidate:
    timing = None if median_s is None else Timing(median_s=median_s, iqr_s=0.0, samples=1)
    return Candidate(case=shape, place=place, tiles=tiles, timing=timing, note="" if timing else "does not fit")


def test_winner_has_the_least_geometric_mean_and_ran_everywhere():
    lines = [candidate("a", "s1", 1.0), candidate("a", "s2", 9.0)]
    lines += [candidate("b", "s1", 2.0), candidate("b", "s2", 2.0)]
    lines += [candidate("c", "s1", 0.1), candidate("c", "s2", None)]
    assert winners(lines) == {"p": "b"}


def test_winners_print_as_entries_of_the_tables():
    tiles = TritonTiles(columns=64)
    text = entry_per_kind("NVIDIA H200", {"(4096, 6144)": repr(tiles)})
    assert eval("{" + text + "}", {"TritonTiles": TritonTiles}) == {"NVIDIA H200": {(4096, 6144): tiles}}
    assert eval("{" + entry_per_kind("K", {"": repr(tiles)}) + "}", {"TritonTiles": TritonTiles}) == {"K": tiles}
    each = PassTiles(rows=64, keys=32)
    text = _table_entry("K", dict.fromkeys(("forward 2", "query_grads 2", "key_grads 2"), repr(each)))
    table = eval("{" + text + "}", {"Tiles": Tiles, "PassTiles": PassTiles})
    assert table == {("K", 2): Tiles(forward=each, query_grads=each, key_grads=each)}


# Cases


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_headline_a_dry_case_and_unique_names(op: str):
    cases = cases_of(op, setting_of("gpu", is_dry=False))
    assert len({case.name for case in cases}) == len(cases)
    assert sum(case.is_timed for case in cases) > 0
    assert any(case.is_for_dry for case in cases_of(op, setting_of("gpu", is_dry=True)))
    assert any(case.is_for_dry for case in cases_of(op, setting_of("tpu", is_dry=True)))


@pytest.mark.parametrize("op", OPS)
def test_programs_and_truth_agree_in_shape_at_real_sizes(op: str):
    cases = cases_of(op, setting_of("gpu", is_dry=False))
    rank = min(case.rank for case in cases)
    for case in (case for case in cases if case.rank == rank):
        inputs = jax.eval_shape(lambda case=case: case.make_inputs(0))
        shapes = {
            name: jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(program, *inputs))
            for name, program in {**case.programs, "truth": case.truth}.items()
        }
        assert len({str(jax.tree.leaves(shape)) for shape in shapes.values()}) == 1, case.name


@pytest.mark.torch
def test_torch_rivals_run_in_a_process_of_their_own():
    attention = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "queries": 3, "keys": 5, "is_causal": False}
    specs = [
        {"case": "a", "kind": "attention", **attention, "backward": True, "set_bytes": 2**28},
        {"case": "b", "kind": "matmul", "rows": 2, "width": 3, "columns": 4, "set_bytes": 2**28},
        {"case": "c", "kind": "linear_cross_entropy", "rows": 3, "width": 4, "vocab_size": 5},
        {"case": "d", "kind": "matmul", "set_bytes": 1},
    ]
    lines = torch_rivals.run_in_subprocess(specs, 120.0)
    assert [line["note"] for line in lines[:3]] == ["dry"] * 3
    assert "KeyError" in lines[3]["note"]
