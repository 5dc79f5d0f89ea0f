"""Calls are found in text, the same way in whichever pieces it comes."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve.http.message import Part
from serve.http.tools import Calls
from tests.serve.in_pieces import pieces_of, read

GOOD = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
CALL = [Part("call", "f"), Part("arguments", '{"x": 1}')]


def parse(text: str, *, is_certain: bool = False) -> list[Part]:
    return read(Calls(["f", "g"], is_certain=is_certain), [text])


@given(pieces_of(), st.booleans())
@example(["a\n<tool", "_call>", '\n{"name": "f", "argum', 'ents": {"x": "</tool_call>"}', "}\n</tool_call>"], False)
@example(["<tool_call>", '\n{"name": "f", "argum', 'ents": {"x": "}\\n</tool_call>"}', "}\n</tool_", "call>"], True)
@example(["<tool_call>", '{"name": "f"}</tool_', "call>"], False)
def test_calls_are_the_same_in_any_pieces(pieces, is_certain):
    parts = read(Calls(["f"], is_certain=is_certain), pieces)
    assert parts == parse("".join(pieces), is_certain=is_certain)


@given(pieces_of())
def test_every_call_that_was_not_promised_is_whole(pieces):
    parts = parse("".join(pieces))
    for name, arguments in itertools.pairwise(parts):
        if name.kind == "call":
            assert arguments.kind == "arguments" and isinstance(json.loads(arguments.text), dict)


@given(pieces_of())
def test_a_text_without_a_call_is_shown_as_it_is(pieces):
    text = "".join(pieces)
    parts = parse(text)
    if not any(part.kind == "call" for part in parts):
        assert parts == ([Part("content", text)] if text else [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, CALL),
        (f"Let me see.\n\n{GOOD}\n", [Part("content", "Let me see."), *CALL]),
        (f"{GOOD}\n{GOOD}", CALL + CALL),
        (f"{GOOD}\nDone.", [*CALL, Part("content", "\nDone.")]),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f"}', CALL),
        ('<tool_call>\n{"name": "g"}\n</tool_call>', [Part("call", "g"), Part("arguments", "{}")]),
    ],
)
def test_calls_are_found(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "inside",
    [
        '{"name": "unknown", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "f", "arguments": {"x": 1}',
        '{"name": ["f"], "arguments": {}}',
        '["name"]',
        "7",
        "[" * 100_000,
        "",
    ],
)
def test_a_malformed_call_is_text_and_spoils_none_behind_it(inside):
    bad = f"so \n<tool_call>\n{inside}\n</tool_call>"
    assert parse(bad) == [Part("content", bad)]
    assert parse(bad + GOOD) == [Part("content", bad), *CALL]


def test_an_end_within_a_string_is_none():
    arguments = {"x": 'say "</tool_call>" \\'}
    text = f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    for is_certain in (False, True):
        call, written = parse(text, is_certain=is_certain)
        assert (call.text, json.loads(written.text)) == ("f", arguments)


def test_the_beginning_of_a_tag_waits():
    parser = Calls(["f"], is_certain=False)
    assert parser.push("a <tool") == [Part("content", "a")]
    assert parser.push("s>") == [Part("content", " <tools>")]


def test_arguments_that_are_sure_to_be_good_are_shown_as_they_come():
    parser = Calls(["f"], is_certain=True)
    assert parser.push('<tool_call>\n{"name": "f", "argu') == []
    assert parser.push('ments": {"x": ') == [Part("call", "f"), Part("arguments", '{"x": ')]
    assert parser.push("1}") == [Part("arguments", "1")]
    assert parser.push("}\n</tool_call>") == [Part("arguments", "}")]
    assert parser.finish() == []
