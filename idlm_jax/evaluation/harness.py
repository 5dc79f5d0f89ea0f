"""What both harnesses are told, and what they give back."""

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

from idlm_jax.evaluation.suite import Suite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The server under test.

    Attributes:
        url: up to and with `/v1`.
        model: as the server names it.
        api_key: None if it wants none.
        flags: with which it was started for the run: the stride and the adapter are not in the model's name.
    """

    url: str
    model: str
    api_key: str | None = None
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is cut.

    Attributes:
        limit: questions of each benchmark (of each subject or subset where it has such); None for all.
        concurrency: requests at once.
        seed: of every request's sampling.
        timeout_s: of a request; 32,768 tokens take their time.
    """

    limit: int | None = None
    concurrency: int = 8
    seed: int = 1234
    timeout_s: int = 7200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What a harness measured.

    Attributes:
        percent: 0 to 100.
        stderr_percent: of the mean over questions; None if the harness gives none.
        num_samples: questions; None if the harness does not say.
        version: the harness and its version.
    """

    percent: float
    stderr_percent: float | None
    num_samples: int | None
    version: str


class HarnessFailed(Exception):
    """A harness ended without a score; the message says where its own words are."""


def find_program(name: str, given: Path | None, environment: Path, install: str) -> Path:
    """The harness's program: the one given, the one in `environment`, or the first on PATH.

    Raises:
        ValueError: there is none; the message says how to get it.
    """
    if given is not None:
        if not given.is_file():
            raise ValueError(f"{given} does not exist")
        return given
    ours = environment / "bin" / name
    found = str(ours) if ours.is_file() else shutil.which(name)
    if found is None:
        raise ValueError(f"{name} is not installed, neither in {environment} nor on PATH: {install}")
    return Path(found)


def installed_version(program: Path, package: str) -> str:
    """The version of the package that a program of a virtual environment belongs to; "?" if it cannot be told."""
    python = program.with_name("python")
    if not python.is_file():
        return "?"
    ask = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=60)
    return told.stdout.strip() or "?"


def sampling_arguments(suite: Suite, **renamed: str) -> dict[str, Any]:
    """The suite's sampling as keyword arguments of a harness, some under the harness's own names."""
    named = suite.sampling.model_dump(exclude_none=True)
    return {renamed.get(name, name): value for name, value in named.items()}
