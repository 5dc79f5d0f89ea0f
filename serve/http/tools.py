"""Calls of tools in an answer's text, as Qwen3 and Hermes write them.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
import re
from collections.abc import Collection
from typing import Literal

from serve.http.message import Part, overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# What surrounds the arguments in a call that a grammar wrote. A newline in JSON stands outside of strings, and within
# such arguments nowhere, so that nothing but the end of the call looks like its end.
BEFORE_NAME, BEFORE_ARGUMENTS, BEHIND_ARGUMENTS = '\n{"name": "', '", "arguments": ', "}\n"

_HEAD = re.compile(re.escape(BEFORE_NAME) + '([^"]*)' + re.escape(BEFORE_ARGUMENTS))
_END = BEHIND_ARGUMENTS + CLOSE
_STRING_OR_CLOSE = re.compile(rf'"(?:[^"\\\n]|\\.)*"?|{CLOSE}')


class Calls:
    """Finds calls in text as it comes. Whitespace next to a call is dropped."""

    def __init__(self, names: Collection[str], *, is_certain: bool):
        """Starts before the text.

        Args:
            names: functions that may be called; the call of another is text.
            is_certain: a grammar sees to it that all calls are good, so arguments are shown as they come. Otherwise a
                call waits for its end, for a malformed one is text.
        """
        self._names, self._is_certain = names, is_certain
        self._state: Literal["text", "call", "arguments"] = "text"
        self._held = ""
        self._gap = ""  # whitespace before the call that is being read
        self._has_called = False

    def push(self, text: str) -> list[Part]:
        """Takes text; returns what is now certain."""
        self._held += text
        parts: list[Part] = []
        while True:
            before = self._state, self._held
            if self._state == "text":
                parts += self._read_text()
            elif self._state == "arguments":
                parts += self._read_arguments()
            elif self._is_certain:
                parts += self._read_head()
            else:
                # Looking at all of a long call at each token would cost too much.
                may_end = CLOSE in self._held[-len(text) - len(CLOSE) :]
                parts += self._read_call() if may_end else []
            if before == (self._state, self._held):
                return parts

    def finish(self) -> list[Part]:
        """The rest, when no text follows. A call whose tag is not closed is good if its JSON is complete."""
        held, self._held = self._held, ""
        if self._state == "text":
            return [] if self._has_called and not held.strip() else _part("content", held)
        if self._state == "arguments":
            return _part("arguments", "" if "\n" in held else held)
        return ([] if self._is_certain else self._call(held)) or [Part("content", self._gap + OPEN + held)]

    def _read_text(self) -> list[Part]:
        held, place = self._held, self._held.find(OPEN)
        shown = (held[:place] if place >= 0 else held[: len(held) - overlap(held, OPEN)]).rstrip()
        if place >= 0:
            self._state, self._gap = "call", held[len(shown) : place]
            self._held = held[place + len(OPEN) :]
        else:
            self._held = held[len(shown) :]
        return _part("content", shown)

    def _read_call(self) -> list[Part]:
        place = next((found.start() for found in _STRING_OR_CLOSE.finditer(self._held) if found[0] == CLOSE), None)
        if place is None:
            return []
        inside, self._held = self._held[:place], self._held[place + len(CLOSE) :]
        self._state = "text"
        return self._call(inside) or [Part("content", self._gap + OPEN + inside + CLOSE)]

    def _call(self, text: str) -> list[Part]:
        """A whole call; nothing if it is malformed."""
        try:
            call = json.loads(text, parse_constant=_refuse)
            name, arguments = call["name"], call.get("arguments", {})
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return []
            written = json.dumps(arguments, ensure_ascii=False)
            written.encode()  # half of a surrogate pair is no text
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
        self._has_called = True
        return [Part("call", name), Part("arguments", written)]

    def _read_head(self) -> list[Part]:
        head = _HEAD.match(self._held)
        if head is None:
            return []
        self._state, self._has_called, self._held = "arguments", True, self._held[head.end() :]
        return [Part("call", head[1])]

    def _read_arguments(self) -> list[Part]:
        place = self._held.find(_END)
        shown = self._held[:place] if place >= 0 else self._held[: len(self._held) - overlap(self._held, _END)]
        if place >= 0:
            self._state, self._held = "text", self._held[place + len(_END) :]
        else:
            self._held = self._held[len(shown) :]
        return _part("arguments", shown)


def _part(kind: Literal["content", "arguments"], text: str) -> list[Part]:
    return [Part(kind, text)] if text else []


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
