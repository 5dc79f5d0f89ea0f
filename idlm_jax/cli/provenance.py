"""What every written result says of itself: by what command, when, with what, and on which device."""

import platform
from datetime import date
from typing import Any

import jax


def provenance(command: str) -> dict[str, Any]:
    """The first entries of a record."""
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
