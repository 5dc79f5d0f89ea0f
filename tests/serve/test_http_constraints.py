"""What a grammar of ours lets through, whether tags are text to the tokenizer or tokens of their own."""

import json
from collections.abc import Callable

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve.http.constraints import calls_constraint, choice_constraint, grammar_text, json_constraint, regex_constraint
from serve.http.conversation import Function
from serve.http.message import Part
from serve.http.tools import Calls
from tests.serve.http_server import MODEL

FUNCTIONS = [
    Function(name="f", parameters={"properties": {"x": {"type": "string"}}, "required": ["x"]}),
    Function(name="g"),
]
F = '<tool_call>\n{"name": "f", "arguments": {"x": "a}\\n</"}}\n</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
THOUGHTS = "so <b\n{it} is"


@pytest.fixture(scope="module", params=["text", "tokens"])
def tokenizer(request) -> PreTrainedTokenizerBase:
    """The tiny model's, which knows no tags, and one that has them as Qwen3 does: added, and not special."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if request.param == "tokens":
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


Allows = Callable[[str, str], bool]


@pytest.fixture(scope="module")
def allows(tokenizer) -> Allows:
    """Whether a grammar allows every token of a text, and then its end."""
    vocabulary = from_tokenizer(tokenizer, eos_token=[0])

    def allows(grammar: str, text: str) -> bool:
        matcher, tokens = LLMatcher(vocabulary, grammar, log_level=0), tokenizer.encode(text)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return allows


@pytest.mark.parametrize("many", [True, False])
def test_demanded_calls_are_what_the_parser_reads(tokenizer, allows, many):
    grammar = grammar_text([calls_constraint(FUNCTIONS, tokenizer, many=many)], "behind", tokenizer)
    for text in (F, G, f"{G}\n{F}"):
        assert allows(grammar, text) == (many or text in (F, G))
        parts = Calls(["f", "g"], is_certain=True).push(text)
        assert [part.text for part in parts if part.kind == "call"] == (
            ["g", "f"] if text not in (F, G) else [text[22]]
        )
    for text in ("", F + "!", F.replace('"f"', '"h"'), F.replace('"x"', '"y"'), G.replace("{}", "{ }"), G[:-1]):
        assert not allows(grammar, text), text
    assert Calls(["f", "g"], is_certain=True).push(F)[-1] == Part("arguments", '{"x": "a}\\n</"}')


@pytest.mark.parametrize("thinking", ["free", "inside", "behind"])
def test_an_answer_has_its_form_behind_reasoning_too(tokenizer, allows, thinking):
    forms = [json_constraint("x", {"type": "object"}), calls_constraint(FUNCTIONS, tokenizer, many=False)]
    grammar = grammar_text(forms, thinking, tokenizer)
    block = f"\n{THOUGHTS}\n</think>\n\n"
    for answer in ('{"a": [1, 2], "b": {}}', G):
        assert allows(grammar, answer) == (thinking != "inside")
        assert allows(grammar, block + answer) == (thinking == "inside")
        # Within a block, a tag that is text is a thought like any other.
        opens_twice = thinking == "inside" and len(tokenizer.encode("<think>")) > 1
        assert allows(grammar, "<think>" + block + answer) == (thinking == "free" or opens_twice)
    for text in (block, block + "no", "<think>" + block + "no", "no"):
        assert not allows(grammar, text)


def test_a_choice_is_one_of_the_texts_whatever_they_hold(tokenizer, allows):
    texts = ['a"\n', "é😀", "b c/", "\\", "<x>"]
    grammar = grammar_text([choice_constraint("x", texts)], "behind", tokenizer)
    assert all(allows(grammar, text) for text in texts)
    assert not any(allows(grammar, text[:-1]) for text in texts)


def test_a_regular_expression_is_matched_from_end_to_end(tokenizer, allows):
    grammar = grammar_text([regex_constraint("x", r'[a-c]+/"\n\d')], "behind", tokenizer)
    assert allows(grammar, 'abc/"\n1')
    assert not allows(grammar, 'xabc/"\n1') and not allows(grammar, "abc")


def test_json_is_written_as_pythons_json_writes_it_unless_the_schema_says_otherwise(tokenizer, allows):
    value = {"a": [1, 2.5, None], "b": {"c": "d"}}
    free = {"x-guidance": {"whitespace_flexible": True}}
    for schema, is_free in ({}, False), (True, False), (free, True):
        grammar = grammar_text([json_constraint("x", schema)], "behind", tokenizer)
        assert allows(grammar, json.dumps(value))
        assert allows(grammar, json.dumps(value, indent=1)) == is_free
