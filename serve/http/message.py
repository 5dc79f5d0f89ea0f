"""An assistant's message as it grows: reasoning, text for the user, calls of tools."""

from collections.abc import Iterable
from typing import Literal, NamedTuple


class Part(NamedTuple):
    """News of a message; nothing is ever taken back.

    Attributes:
        kind: what `text` is: more reasoning, more content, the name of a function that is called now, or more of the
            JSON of its arguments.
        text: never empty.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same news in fewer parts."""
    together: list[Part] = []
    for part in parts:
        if together and part.kind == together[-1].kind != "call":
            together[-1] = Part(part.kind, together[-1].text + part.text)
        else:
            together.append(part)
    return together


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with, short of all of it."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
