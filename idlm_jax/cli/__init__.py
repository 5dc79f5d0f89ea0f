"""`idlm`: the command line. The composition root: it alone may reach up into `train`, which runs from a checkout."""

import logging
import sys
from typing import Any

import typer
from typer.core import TyperCommand

from idlm_jax.cli.continuations import continue_documents
from idlm_jax.cli.demo import demo
from idlm_jax.cli.evaluate import evaluate
from idlm_jax.cli.evaluate_suite import evaluate_suite
from idlm_jax.cli.export import export
from idlm_jax.cli.generate import generate
from idlm_jax.cli.measure import measure
from idlm_jax.cli.pack import pack, show
from idlm_jax.cli.regenerate import regenerate
from idlm_jax.cli.trace import trace


class EvalCommand(TyperCommand):
    """`idlm eval` by held-out text, or with --suite by public benchmarks: two commands, each with its own --help."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hands the arguments to the other command if they name a suite."""
        if any(each.partition("=")[0] == "--suite" for each in args):
            return suite_command().make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def suite_command() -> Any:
    """`idlm eval --suite`, as a command by itself."""
    alone = typer.Typer(add_completion=False)
    alone.command(name="eval")(evaluate_suite)
    return typer.main.get_command(alone)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Introspective diffusion language models: generate, trace, export, evaluate, measure, prepare data, and a "
    "five-minute demo. Training is `python -m train CONFIG.yaml key=value ...` from a checkout.",
)
app.command()(generate)
app.command()(trace)
app.command()(export)
app.command(
    name="eval",
    cls=EvalCommand,
    epilog="Public benchmarks, beside published figures: idlm eval --suite idlm15 --help.",
)(evaluate)
app.command()(measure)
app.command()(pack)
app.command()(show)
app.command()(regenerate)
app.command(name="continue")(continue_documents)
app.command()(demo)


def main() -> None:
    """Runs a command; a refused input ends in one line on stderr and exit code 2, never in a traceback."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pallas_kernels").setLevel(logging.INFO)  # which kernels were chosen
    try:
        app()
    except (ValueError, NotImplementedError, FileNotFoundError, OSError) as error:
        print(f"idlm: {error}", file=sys.stderr)
        sys.exit(2)
