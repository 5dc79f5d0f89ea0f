"""Reasoning is split from the answer, the same way in whichever pieces the text comes."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from serve.http.message import Part
from serve.http.reasoning import Reasoning, thinking_after
from tests.serve.in_pieces import pieces_of, read


def split(text: str, thinking="free") -> tuple[str, str]:
    parts = read(Reasoning(thinking), [text])
    return tuple("".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content"))


@given(pieces_of(), st.sampled_from(["free", "inside", "behind"]))
@example(["<think>\n", "a", "\n", "</th", "ink>", "\n", "\n", "b"], "free")
def test_reasoning_is_the_same_in_any_pieces(pieces, thinking):
    assert read(Reasoning(thinking), pieces) == read(Reasoning(thinking), ["".join(pieces)])


@given(pieces_of())
def test_a_text_without_a_block_is_shown_as_it_is(pieces):
    text = "".join(pieces)
    if not text.lstrip().startswith("<think>"):
        assert split(text) == ("", text)
    assert split(text, "behind") == ("", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nso\n</think>\n\nyes ", ("so", "yes ")),
        ("\n<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
        ("<think>\n\n</think>\n\nyes", ("", "yes")),
        ("<think>never ends </thin", ("never ends </thin", "")),
        ("<think>a\n", ("a", "")),
        ("<thin", ("", "<thin")),
        ("not first <think>a</think>", ("", "not first <think>a</think>")),
        ("", ("", "")),
    ],
)
def test_reasoning_is_what_the_block_at_the_beginning_holds(text, expected):
    assert split(text) == expected


def test_a_prompt_that_opens_the_block_leaves_the_model_inside():
    assert thinking_after("<|im_start|>assistant\n<think>\n") == "inside"
    assert split("so\n</think>\n\nyes", "inside") == ("so", "yes")
    assert split("so it goes", "inside") == ("so it goes", "")


def test_a_prompt_that_closes_an_empty_block_leaves_it_behind():
    assert thinking_after("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "behind"
    assert thinking_after("<|im_start|>assistant\n") == "free"


def test_reasoning_is_shown_before_its_block_ends():
    parser = Reasoning("free")
    assert parser.push("<think>one ") == [Part("reasoning", "one")]
    assert parser.push("two</") == [Part("reasoning", " two")]
    assert parser.is_thinking
    assert parser.push("think>\n") == [] and not parser.is_thinking
    assert parser.push("\nyes") == [Part("content", "yes")]
