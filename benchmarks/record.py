"""What every result says of itself, and where it goes: JSON with every figure, Markdown to read."""

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import jax


def provenance(command: str) -> dict[str, Any]:
    """The first entries of a record: by what command, when, with what, and on which device."""
    return {
        "command": command,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }


def origin(record: dict[str, Any], dtype: str | None = None) -> str:
    """The same as the beginning of a sentence that ends in the command."""
    versions = f"Python {record['versions']['python']}, jax {record['versions']['jax']}: `{record['command']}`."
    return ", ".join([record["date"], record["device"], *([] if dtype is None else [dtype]), versions])


def write(folder: Path, name: str, record: dict[str, Any], markdown: str) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown)
