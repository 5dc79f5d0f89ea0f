"""`idlm`: the command line. The composition root: it alone may reach up into `train`, which runs from a checkout."""

import logging
import sys

import typer

from idlm_jax.cli.continuations import continue_documents
from idlm_jax.cli.demo import demo
from idlm_jax.cli.evaluate import evaluate
from idlm_jax.cli.export import export
from idlm_jax.cli.generate import generate
from idlm_jax.cli.pack import pack, show
from idlm_jax.cli.regenerate import regenerate
from idlm_jax.cli.trace import trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Introspective diffusion language models: generate, trace, export, evaluate, prepare data, and a five-minute "
    "demo. Training is `python -m train CONFIG.yaml key=value ...` from a checkout.",
)
app.command()(generate)
app.command()(trace)
app.command()(export)
app.command(name="eval")(evaluate)
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
