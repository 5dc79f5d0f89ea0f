"""What a config class says about itself, for `--help` and for the nearest name of a misspelt key."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any, Literal


def describe(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every field of a config class and of the classes in it, in order: dotted name, type, default, help.

    Args:
        cls: a dataclass whose hints are all `Annotated` with a pydantic field.
        prefix: of the names.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, *annotations = typing.get_args(hints[field.name])
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = json.dumps(field.default, default=dataclasses.asdict).strip('"')
        help_text = next((item.description for item in annotations if item.description), "")
        yield prefix + field.name, _type_name(hint), default, help_text
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from describe(part, f"{prefix}{field.name}.")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    parts = [part for part in typing.get_args(hint) if part is not Ellipsis]
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(parts[0])}"
    if parts:
        return "|".join(_type_name(part) for part in parts)
    if dataclasses.is_dataclass(hint):
        return "section"
    return "null" if hint is type(None) else hint.__name__
