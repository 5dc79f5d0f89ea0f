"""Command line of the device kit: `benchmarks/device/run.sh <part>`."""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.device import torch_rivals
from benchmarks.device.budget import Budget
from benchmarks.device.case import KERNEL_BODY, Case, setting_of
from benchmarks.device.cases import OPS, cases_of
from benchmarks.device.checks import FAIL, check_all
from benchmarks.device.compiling import Compiler
from benchmarks.device.floors import measure_floors
from benchmarks.device.report import Report, default_folder, describe_environment
from benchmarks.device.speed import time_all
from benchmarks.device.tuning import tune, winners

DESCRIPTION = """\
Checks, times and tunes the kernels on the accelerator of this machine.

  run.sh kernels                     every kernel: correct? how fast, against floors and rivals?
  run.sh kernels --only verify       one op (comma-separated for more)
  run.sh tune quantized_matmul       tries tile sizes, prints the winners as text for the op's tiles.py
  run.sh train                       whole training steps: 8B with an adapter, 24 layers of 8B, 0.6B, 1.7B; MFU
  run.sh serve                       the server's decode step, 8B: AR and ISD at several batches and contexts
  run.sh exact                       tiny model, 1,120 prompts: R-ISD against AR, tokens and logit checksums; resumed
                                     where --out holds part of it from this device, revision and driver
  run.sh convert                     trains a parent of 57M parameters on the Python packages of this machine, converts
                                     it (adapter and whole, our recipe and the paper's), decodes; goes on if run again
  run.sh load                        the server, AR, ISD and "auto", 1 to 64 callers, on what `convert` left here,
                                     else on the tiny model
  run.sh kernels --dry               the same path on a CPU in seconds: tiny shapes, interpreters, no figures

A run ends within --budget-s whatever happens: what no longer fits is listed as "skipped (time)".
Results: <part>.json with everything and <part>.md to read, in --out.
Exit status: 0; 1 if a correctness check failed; 2 for a wrong command line.
"""
TORCH_RESERVE_S = 75.0
END_S = 10.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 and the parts there are if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="run.sh", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="part", help=", ".join(PARTS))
    for name in PARTS:
        part = parts.add_parser(name, help=PARTS[name].__doc__, description=PARTS[name].__doc__, allow_abbrev=False)
        if name == "tune":
            part.add_argument("op", choices=OPS, help="op whose tiles to try")
        elif name == "kernels":
            part.add_argument("--only", type=_ops, default=OPS, metavar="OP,..", help=f"of {', '.join(OPS)}")
        part.add_argument("--shapes", default="", metavar="TEXT", help="only cases whose name holds this text")
        part.add_argument(
            "--dry",
            nargs="?",
            const="gpu",
            choices=sorted(KERNEL_BODY),
            help="on CPU, tiny shapes, the kernels of this platform (default gpu) interpreted; publishes no figure",
        )
        part.add_argument("--budget-s", type=float, default=520.0, metavar="S", help="seconds for all (default 520)")
        part.add_argument(
            "--out", type=Path, metavar="DIR", help="default: $OUT, else benchmarks/results/<date>-<kind>"
        )
    return parser.parse_args(arguments)


def _ops(text: str) -> tuple[str, ...]:
    ops = tuple(text.split(","))
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown; choose from {', '.join(OPS)}")
    return ops


def run_kernels(options: argparse.Namespace, cases: list[Case], report: Report, budget: Budget) -> None:
    """Correctness, then speed against floors and rivals."""
    compiler = Compiler()
    folder = options.out
    try:
        report.floors = measure_floors(is_dry=bool(options.dry))
        report.write(folder, "kernels")
        # Speed keeps its share of the time even if compiling for the checks takes long.
        report.checks = check_all(cases, compiler, budget, reserve_s=0.4 * budget.total_s)
        report.write(folder, "kernels")
        reserve_s = END_S if options.dry else END_S + min(TORCH_RESERVE_S, 0.15 * budget.total_s)
        report.speeds = time_all(cases, report.floors, compiler, budget, is_dry=bool(options.dry), reserve_s=reserve_s)
        report.write(folder, "kernels")
        if options.dry:
            report.torch = [{"note": "dry: not run"}]
        else:
            specs = [{**case.torch, "case": case.name} for case in cases if case.torch and case.is_timed]
            report.torch = torch_rivals.run_in_subprocess(specs, budget.left_s - END_S)
    finally:
        _finish(compiler, report, budget, folder, "kernels")


def run_tune(options: argparse.Namespace, cases: list[Case], report: Report, budget: Budget) -> None:
    """Times candidate tiles of one op and prints the winners."""
    compiler = Compiler()
    try:
        report.candidates = tune(cases, compiler, budget, is_dry=bool(options.dry))
        if best := winners(report.candidates):
            report.tiles_entry = cases[0].table_entry(report.environment["device"], best)
    finally:
        _finish(compiler, report, budget, options.out, f"tune_{options.op}")


def run_train(options: argparse.Namespace, cases: list[Any], report: Report, budget: Budget) -> None:
    """Times whole training steps, compiled all at once and run one after the other."""
    from benchmarks.device.train_steps import time_steps

    compiler = Compiler()
    try:
        platform = "cpu" if options.dry else jax.default_backend()
        report.steps = time_steps(cases, compiler, budget, platform, is_dry=bool(options.dry))
    finally:
        _finish(compiler, report, budget, options.out, "train")


def run_serve(options: argparse.Namespace, cases: list[Any], report: Report, budget: Budget) -> None:
    """Times decode steps of the server, AR and ISD."""
    from benchmarks.device.serve_steps import time_serving

    compiler = Compiler()
    try:
        platform = "cpu" if options.dry else jax.default_backend()
        report.serving = time_serving(cases, budget, platform, is_dry=bool(options.dry))
    finally:
        _finish(compiler, report, budget, options.out, "serve")


def run_exact(options: argparse.Namespace, cases: list[Any], report: Report, budget: Budget) -> None:
    """Compares R-ISD with AR, token for token and checksum for checksum, in both modes and dtypes."""
    from benchmarks.device.exact import ExactLine, compare

    compiler = Compiler()
    try:
        before = {line["case"]: ExactLine(**line) for line in report.resumed(options.out)}
        for lines in compare(cases, before, budget, is_dry=bool(options.dry)):
            report.exact = list(lines.values())
            report.write(options.out, "exact")
    finally:
        _finish(compiler, report, budget, options.out, "exact")


def run_convert(options: argparse.Namespace, cases: list[Any], report: Report, budget: Budget) -> None:
    """Trains a parent on this machine's Python packages and converts it: acceptance, tokens per forward, curves."""
    from benchmarks.device.convert import convert

    compiler = Compiler()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for lines in convert(cases, options.out, budget):
            report.conversions = lines
            report.write(options.out, "convert")
    finally:
        _finish(compiler, report, budget, options.out, "convert")


def run_load(options: argparse.Namespace, cases: list[Any], report: Report, budget: Budget) -> None:
    """Starts servers on this machine and puts load on them: AR, ISD at fixed strides, and the stride it chooses."""
    from benchmarks.device.load import put_load

    compiler = Compiler()
    try:
        for note in put_load(cases, options.out, budget):
            report.notes.append(note)
            report.write(options.out, "load")
    finally:
        _finish(compiler, report, budget, options.out, "load")


# Imported by the run of the part alone: training, the server and the model need packages that kernels do without.
OWN_CASES = {"train": "train_steps", "serve": "serve_steps", "exact": "exact", "convert": "convert", "load": "load"}
PARTS: dict[str, Callable[[argparse.Namespace, Any, Report, Budget], None]] = {
    "kernels": run_kernels,
    "tune": run_tune,
    "train": run_train,
    "serve": run_serve,
    "exact": run_exact,
    "convert": run_convert,
    "load": run_load,
}


def _finish(compiler: Compiler, report: Report, budget: Budget, folder: Path, part: str) -> None:
    report.elapsed_s = budget.elapsed_s
    report.write(folder, part)
    print(report.markdown())
    num_checks = len(report.checks) + len(report.exact)
    print(f"\n{num_checks} checks, {report.num_failed} failed; {budget.elapsed_s:.0f} s; {folder / part}.json")
    for check in report.checks:
        if check.status == FAIL:
            print(f"FAIL {check.case} {check.program}: {check.problem}")
    if compiler.close() and sys.exc_info()[0] is None:
        # The interpreter would wait for a compilation that nobody needs any more.
        sys.stdout.flush()
        os._exit(1 if report.num_failed else 0)


def main(arguments: Sequence[str]) -> int:
    """Runs one part; returns the exit status."""
    options = parse(arguments)
    budget = Budget(options.budget_s)
    if options.dry:
        jax.config.update("jax_platforms", "cpu")
        # Interpreted kernels mostly compile; before the backend starts, which reads this once.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    if options.part in ("kernels", "load"):
        # PyTorch's process, or the servers, want their share of the memory; jax takes three quarters ahead by default.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        setting = setting_of(options.dry or jax.default_backend(), is_dry=bool(options.dry))
    except ValueError as error:
        print(f"run.sh: {error}", file=sys.stderr)
        return 2
    cases: Sequence[Any]
    if options.part in OWN_CASES:
        steps = importlib.import_module(f"benchmarks.device.{OWN_CASES[options.part]}")
        ops = (options.part,)
        cases = [case for case in (steps.DRY if options.dry else steps.CASES) if options.shapes in case.name]
    else:
        ops = (options.op,) if options.part == "tune" else options.only
        of_ops = [case for op in ops for case in cases_of(op, setting) if options.shapes in case.name]
        cases = sorted((case for case in of_ops if case.is_for_dry or not options.dry), key=lambda case: case.rank)
    if not cases:
        print(f"no case of {', '.join(ops)} holds {options.shapes!r} in its name", file=sys.stderr)
        return 2
    if options.part == "tune" and not any(case.tunings for case in cases):
        print(f"{options.op} has no tiles to tune at these shapes", file=sys.stderr)
        return 2
    environment = describe_environment(shlex.join(["benchmarks/device/run.sh", *arguments]))
    options.out = options.out or Path(os.environ.get("OUT") or default_folder(environment["device"]))
    report = Report(environment=environment, is_dry=bool(options.dry))
    PARTS[options.part](options, cases, report, budget)
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
