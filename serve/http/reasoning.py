"""Where an answer's reasoning ends: Qwen3's <think> block."""

from typing import Literal

from serve.http.message import Part, overlap

OPEN, CLOSE = "<think>", "</think>"

# Where a prompt leaves the model: inside a block, behind one, or free to begin one.
Thinking = Literal["inside", "behind", "free"]


def thinking_after(prompt: str) -> Thinking:
    """What a rendered prompt says: some templates open the block themselves, or close an empty one."""
    text = prompt.rstrip()
    if text.endswith(OPEN):
        return "inside"
    return "behind" if text.endswith(CLOSE) else "free"


_State = Literal["before", "inside", "behind", "past"]
_START: dict[Thinking, _State] = {"free": "before", "inside": "inside", "behind": "past"}


class Reasoning:
    """Splits text as it comes. A block counts if the answer begins with it; whitespace at its borders is dropped."""

    def __init__(self, thinking: Thinking):
        self._state: _State = _START[thinking]
        self._held = ""
        self._is_fresh = True  # no reasoning has been shown

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends within the block."""
        return self._state == "inside"

    def push(self, text: str) -> list[Part]:
        """Takes text; returns what is now certain."""
        held, self._held = self._held + text, ""
        parts: list[Part] = []
        if self._state == "before":
            bare = held.lstrip()
            if bare.startswith(OPEN):
                self._state, held = "inside", bare[len(OPEN) :]
            elif OPEN.startswith(bare):
                self._held = held
                return []
            else:
                self._state = "past"
        if self._state == "inside":
            place = held.find(CLOSE)
            # Whitespace waits too: it is dropped if the block ends behind it.
            shown = (held[:place] if place >= 0 else held[: len(held) - overlap(held, CLOSE)]).rstrip()
            rest = held[len(shown) :]
            shown = shown.lstrip() if self._is_fresh else shown
            if shown:
                parts.append(Part("reasoning", shown))
                self._is_fresh = False
            if place < 0:
                self._held = rest
                return parts
            self._state, held = "behind", held[place + len(CLOSE) :]
        if self._state == "behind":
            held = held.lstrip()
            self._state = "past" if held else "behind"
        if held:
            parts.append(Part("content", held))
        return parts

    def finish(self) -> list[Part]:
        """The rest, when no text follows. A block that did not end was all reasoning."""
        held, self._held = self._held, ""
        if self._state == "inside":
            held = held.strip() if self._is_fresh else held.rstrip()
            return [Part("reasoning", held)] if held else []
        return [Part("content", held)] if held else []
