"""`python -m train CONFIG [key=value ...]`: one run from one YAML file; the same command again resumes it."""

import argparse
import logging
import os
import signal
import sys
import textwrap
from types import FrameType
from typing import Literal

from train.config import ConfigError, TrainConfig, describe_keys, load_config, to_yaml

_INTRODUCTION = """\
Train a model, or go on training it: the same command again resumes exactly where its last checkpoint is.

  python -m train configs/tiny_ar_cpu.yaml                        next-token pretraining of a tiny model
  python -m train configs/tiny_introspective_cpu.yaml             turns it into a diffusion model
  python -m train configs/tiny_ar_cpu.yaml steps=50 run_name=try  any key of the file can be overridden
  python -m train configs/tiny_ar_cpu.yaml --print-config         what would run, and nothing else
  python -m train configs/qwen3_8b.yaml --plan h100x8             would it fit? how fast at best? (no GPU needed)
  srun python -m train configs/x.yaml --distributed mesh.fsdp=-1  one of several processes (docs/hosts.md)

A run's folder, <output_dir>/<run_name>, receives config.yaml, metrics.jsonl, tb/ (TensorBoard),
checkpoints/ and, at the end, hf/ (a Hugging Face folder) or adapter/ (PEFT files, with lora). SIGTERM or
Ctrl-C saves first; of several processes, any one's.
"""
_EXIT_CODES = "Exit codes: 0 finished; 1 failed or diverged; 2 wrong config; 128+signal saved and stopped on a signal."


class _StopFlag:
    """Remembers the first SIGTERM or SIGINT; the second one acts as usual."""

    def __init__(self) -> None:
        self.signal_number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_number = number
        signal.signal(number, signal.SIG_DFL)
        print("stopping after this step; once more to stop at once", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, trains, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=_INTRODUCTION,
        epilog=_help_on_keys() + "\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="learning_rate=1e-5, lora.rank=16, lora=null")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument(
        "--plan",
        metavar="TARGET",
        nargs="?",
        const="",
        help="compile the step for this machine, or for h100x8, h200x1, v5e-16, v5p-64, v6e-64, ...; print bytes per "
        "device, FLOP and times at best; exit 1 if it does not fit",
    )
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint and exit")
    parser.add_argument("--step", metavar="N|best", help="with --export-only: this checkpoint instead")
    several = parser.add_argument_group("several processes", "the same command on every host; see docs/hosts.md")
    several.add_argument("--distributed", action="store_true", help="JAX finds them: SLURM, MPI, Kubernetes, Cloud TPU")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="or name them: where process 0 listens,")
    several.add_argument("--num-processes", metavar="N", type=int, help="how many there are,")
    several.add_argument("--process-id", metavar="I", type=int, help="and which this one is, from 0")
    several.add_argument("--start-timeout", metavar="S", type=int, default=300, help="wait for the others; default 300")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    try:
        step = _step_of(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.plan is not None:
        return _plan(config, options.plan or None)
    # Imported late: a mistake in the config is answered before JAX is loaded.
    from idlm_jax import cluster

    return cluster.end_promptly(lambda: _train(config, options, step))


def _step_of(options: argparse.Namespace) -> int | Literal["best"] | None:
    if options.step is None or options.step == "best":
        if options.step and not options.export_only:
            raise ConfigError("--step belongs to --export-only")
        return options.step
    if not (options.export_only and options.step.isdecimal()):
        raise ConfigError(f"--step {options.step}: a number or best, and with --export-only")
    return int(options.step)


def _plan(config: TrainConfig, target: str | None) -> int:
    if target is not None:
        # Nothing runs: a compiler must not look for the devices, nor lock out who holds them.
        for name, value in {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            os.environ.setdefault(name, value)
    from train.plan import describe, make_plan

    try:
        plan = make_plan(config, target)
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # No compiler, or one that refuses because memory does not suffice.
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    for line in describe(plan, config):
        print(line)
    return 0 if plan.fits else 1


def _train(config: TrainConfig, options: argparse.Namespace, step: int | Literal["best"] | None) -> int:
    from idlm_jax import cluster
    from train.guard import TrainingDiverged
    from train.loop import export_checkpoint, run_training

    try:
        cluster.join(
            options.coordinator,
            options.num_processes,
            options.process_id,
            is_detected=options.distributed,
            timeout_s=options.start_timeout,
        )
        if cluster.is_first():
            logging.getLogger("pallas_kernels").setLevel(logging.INFO)  # which kernels were chosen
        if options.export_only:
            export_checkpoint(config, step)
            return 0
        stop = _StopFlag()  # only now: JAX takes SIGTERM for itself as the processes meet
        result = run_training(config, should_stop=lambda: stop.signal_number != 0)
        # Another process may be the one that was asked to stop.
        return 0 if result.is_finished else 128 + (stop.signal_number or signal.SIGTERM)
    except (ConfigError, cluster.ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, ValueError, NotImplementedError, OSError) as error:
        # Dataset, checkpoint and config do not fit together, or a file cannot be read or written.
        print(f"error: {error}", file=sys.stderr)
        return 1


def _help_on_keys() -> str:
    lines = ["keys of CONFIG:"]
    for name, kind, default, text in describe_keys():
        default = default if default == "required" else f"default {default}"
        lines += textwrap.wrap(
            f"{name}  {text} ({kind}; {default})", 108, initial_indent="  ", subsequent_indent=" " * 8
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
