"""What a completion must look like, asked for in the words of four APIs, as a grammar that llguidance reads."""

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from serve.http import reasoning, tools
from serve.http.body import Body, Text, invalid
from serve.http.conversation import Function
from serve.http.reasoning import Thinking

Schema = dict[str, Any] | bool
# As json.dumps writes it, which is how models saw calls in training. Free whitespace may never end.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_PARAMETERS = {"properties": {}, "additionalProperties": False}


class NamedSchema(Body):
    """A JSON schema and its name. It is followed whether `strict` or not."""

    name: Text
    schema_: Schema = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body):
    """vLLM's: one of them."""

    json_: Schema | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None


class Constraint(NamedTuple):
    """A demand on the text.

    Attributes:
        field: of the request, where it was made.
        grammar: one of llguidance's grammars, as its JSON has it.
    """

    field: str
    grammar: dict[str, Any]


def json_constraint(field: str, schema: Schema | str) -> Constraint:
    """Text that is JSON of a schema, which may be given as text.

    Raises:
        PydanticCustomError: the schema is not one.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise invalid(field, f"{field} is not JSON: {error}") from error
        if not isinstance(schema, dict | bool):
            raise invalid(field, f"{field} is no JSON schema: a schema is an object")
    # A schema may ask for other whitespace in its own "x-guidance".
    compact = schema if schema is False else {"x-guidance": _COMPACT} | ({} if schema is True else schema)
    return Constraint(field, {"json_schema": compact})


def regex_constraint(field: str, regex: str) -> Constraint:
    """Text that a regular expression matches from end to end; without look-around and back-references."""
    return Constraint(field, json.loads(LLMatcher.grammar_from_regex(regex))["grammars"][0])


def choice_constraint(field: str, choices: Sequence[str]) -> Constraint:
    """One of some texts.

    Raises:
        PydanticCustomError: there is none, or an empty one.
    """
    if not choices or "" in choices:
        raise invalid(field, f"{field} takes at least one text, none of them empty")
    return Constraint(field, {"lark_grammar": "start: " + " | ".join(map(json.dumps, choices))})


def grammar_constraint(field: str, grammar: str) -> Constraint:
    """Text of a context-free grammar, in Lark's syntax or llama.cpp's (GBNF).

    Raises:
        PydanticCustomError: it cannot be read.
    """
    try:
        return Constraint(field, {"lark_grammar": any_to_lark(grammar)})
    except Exception as error:  # the converter raises what it likes
        raise invalid(field, f"{field} cannot be read: {error}") from error


def calls_constraint(functions: Sequence[Function], tokenizer: PreTrainedTokenizerBase, *, many: bool) -> Constraint:
    """Calls of some functions, with arguments that follow their schemas, as `tools.Calls` reads them."""
    opens, closes = _tag(tokenizer, tools.OPEN), _tag(tokenizer, tools.CLOSE)
    lines = ["start: call" + (' ("\\n" call)*' if many else ""), f"call: {opens} body {closes}"]
    lines.append("body: " + " | ".join(f"f{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        head = json.dumps(tools.BEFORE_NAME + function.name + tools.BEFORE_ARGUMENTS)
        schema = {"type": "object"} | (function.parameters or _NO_PARAMETERS) | {"x-guidance": _COMPACT}
        lines.append(f"f{index}: {head} %json {json.dumps(schema)} {json.dumps(tools.BEHIND_ARGUMENTS)}")
    return Constraint("tools", {"lark_grammar": "\n".join(lines)})


def grammar_text(demands: Sequence[Constraint], thinking: Thinking, tokenizer: PreTrainedTokenizerBase) -> str:
    """The grammar of all that the model writes: what follows its reasoning must meet one of the demands.

    Args:
        demands: at least one.
        thinking: whether reasoning comes first: "free" allows a block, "inside" wants the end of one.
        tokenizer: says whether the tags are tokens.
    """
    answers = [demand.grammar | {"name": f"answer{index}"} for index, demand in enumerate(demands)]
    answer = "(" + " | ".join(f"@answer{index}" for index in range(len(answers))) + ")"
    opens, closes = _tag(tokenizer, reasoning.OPEN), _tag(tokenizer, reasoning.CLOSE)
    lines = {
        "behind": [f"start: {answer}"],
        "inside": [f"start: thoughts SPACE? {answer}"],
        "free": [f"start: ({opens} thoughts SPACE?)? {answer}"],
    }[thinking]
    if thinking != "behind":
        # A tag that is text would be part of thoughts without end; one that is a token cannot be.
        is_text = closes.startswith('"')
        lines += [f"thoughts[suffix={closes}]: /(.|\\n)*/" if is_text else f"thoughts: /(.|\\n)*/ {closes}"]
        lines += ["SPACE: /\\n{1,2}/"]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *answers]})


def _tag(tokenizer: PreTrainedTokenizerBase, tag: str) -> str:
    """A tag in Lark: by its id if it is one token, otherwise as text."""
    token = next((token for token, each in tokenizer.added_tokens_decoder.items() if each.content == tag), None)
    return json.dumps(tag) if token is None else f"<[{token}]>"
