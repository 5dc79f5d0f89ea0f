"""Texts that make trouble for parsers, in pieces of any size."""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st

from serve.http.message import Part, joined
from serve.http.reasoning import Reasoning
from serve.http.tools import Calls

FRAGMENTS = ["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "é", "<tool_call>", "</tool_call>", '"', "\\"]
FRAGMENTS += [
    "{",
    "}",
    "}\n",
    '\n{"name": "f", "arguments": ',
    '{"x": "<tool_call>"}',
    '{"name": "f", "arguments": {}}',
]
FRAGMENTS += ['<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>"}}\n</tool_call>']
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@st.composite
def pieces_of(draw: Any) -> list[str]:
    """A text in pieces of any size."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def read(parser: Reasoning | Calls, pieces: Sequence[str]) -> list[Part]:
    """All that a parser makes of some pieces of text. Nothing is taken back: it only ever adds."""
    return joined([part for piece in pieces for part in parser.push(piece)] + parser.finish())
