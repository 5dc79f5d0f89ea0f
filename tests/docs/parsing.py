"""Does a command parse? Its program's own parser decides, and nothing behind the parser runs."""

import argparse
import contextlib
import glob
import importlib
import importlib.util
import io
import re
import runpy
import signal
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.core

from tests.docs.blocks import ROOT, Command

# How argparse and typer complain of something that is not there, which is no fault inside the text.
INCOMPLETE = re.compile(
    r"Missing (argument|option|command)|requires an argument|are required|expected (one|at least one)"
)
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
# Paths below these are the repository's own; others are the reader's, or produced.
OWN = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name not in ("runs", "out", "site"))
# Programs of others, whose flags are not ours to check.
FOREIGN = {"sglang.launch_server", "curl", "kill", "srun", "docker", ".venv/bin/pre-commit", ".venv-docs/bin/mkdocs"}


class Parsed(BaseException):
    """Raised in place of what would run: the arguments were taken."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values


def fault(command: Command) -> str | None:
    """What is wrong with a command, or None."""
    words = command.words
    if any("<" in word or word == "..." for word in words):  # a pattern for commands: only its program is looked at
        words = words[: 3 if words[0] == "python" else 1]
        command = command._replace(words=words, is_whole=False)
    missing = [word for word in words if word.startswith(OWN) and not glob.glob(word, root_dir=ROOT)]
    if missing:
        return f"no such file: {missing}"
    return _fault_of_program(words, command.is_whole)


def after(words: list[str], word: str) -> list[str]:
    """The words behind the first of its kind."""
    return words[words.index(word) + 1 :]


def _fault_of_program(words: list[str], is_whole: bool) -> str | None:
    match words:
        case ["make", *arguments]:
            unknown = [word for word in arguments if "=" not in word and word not in TARGETS]
            return f"no such target: {unknown}" if unknown else None
        case ["idlm", *arguments]:
            return _parse("idlm_jax.cli", arguments, is_whole, entry="main")
        case ["benchmarks/device/run.sh", *arguments]:
            return _parse("benchmarks.device", arguments, is_whole)
        case ["python", "-m", "train.launch_local", *arguments] if "--" in arguments:
            return _parse("train.launch_local", arguments, is_whole) or _fault_of_run(*after(arguments, "--"))
        case ["sbatch", *arguments] if "train/launch_slurm.sh" in arguments:
            return _fault_of_run(*after(arguments, "train/launch_slurm.sh"))
        case ["python", "-m", module, *_] if module in FOREIGN:
            return None
        case ["python", "-m", module, *arguments]:
            return _parse(module, arguments, is_whole)
        case ["python", "-c", program]:
            compile(program, "-c", "exec")
            return None
        case [program, "install", *arguments] if program.endswith("pip"):
            named = [extra for word in arguments for extra in re.findall(r"\.\[(.*)\]", word)]
            unknown = set(",".join(named).split(",")) - EXTRAS - {""}
            return f"no such extra: {unknown}" if unknown else None
        case [".venv/bin/pytest", *arguments]:
            absent = [word for word in arguments if not word.startswith("-") and not glob.glob(word, root_dir=ROOT)]
            return f"no such tests: {absent}" if absent else None
        case [program, *_]:
            return (
                None
                if program in FOREIGN or (ROOT / program).is_file()
                else f"{program}: a program that this test does not know"
            )
        case _:
            return "an empty command"


def _parse(module: str, arguments: list[str], is_whole: bool, entry: str | None = None) -> str | None:
    """What the parser of a module says to the arguments."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return f"no such module: {module}"
    if spec.submodule_search_locations is not None and entry is None:
        spec = importlib.util.find_spec(f"{module}.__main__")
        if spec is None:
            return f"{module} cannot be run with -m"
    source = Path(str(spec.origin)).read_text(encoding="utf-8")
    if "argparse" not in source and "typer" not in source:
        return f"{module} takes no arguments" if arguments else None
    errors = io.StringIO()
    with (
        _nothing_runs(module, arguments),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            if entry is None:
                runpy.run_module(module, run_name="__main__")
            else:
                getattr(importlib.import_module(module), entry)()
        except Parsed as parsed:
            return _fault_of_run(parsed.values["config"], *parsed.values["overrides"]) if module == "train" else None
        except SystemExit as ended:
            if ended.code in (0, None):  # --help
                return None
    said = " ".join(errors.getvalue().split())
    if not is_whole and (not arguments or INCOMPLETE.search(said)):
        return None
    return said or "it ended before its arguments were taken"


def _fault_of_run(config: str, *overrides: str) -> str | None:
    from train.config import ConfigError, load_config

    try:
        load_config(str(ROOT / config), list(overrides))
    except ConfigError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _nothing_runs(module: str, arguments: list[str]) -> Iterator[None]:
    """Lets parsers of typer and argparse take sys.argv, and raises `Parsed` where the program would go on."""

    def stop(self: object, context: Any) -> None:
        raise Parsed(dict(context.params))

    def stopping(parse: Any) -> Any:
        def parse_then_stop(self: object, args: Any = None, namespace: Any = None) -> None:
            raise Parsed(vars(parse(self, args, namespace)))

        return parse_then_stop

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    argv, invoke = sys.argv, typer.core.TyperCommand.invoke
    parsers = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}
    sys.argv = [module, *arguments]
    typer.core.TyperCommand.invoke = stop
    for name, parse in parsers.items():
        setattr(argparse.ArgumentParser, name, stopping(parse))
    try:
        with warnings.catch_warnings():
            # runpy: the module was imported before, under its own name.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.argv, typer.core.TyperCommand.invoke = argv, invoke
        for name, parse in parsers.items():
            setattr(argparse.ArgumentParser, name, parse)
        for number, handler in handlers.items():
            signal.signal(number, handler)
