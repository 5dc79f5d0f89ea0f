"""What may be asked. Whatever this server would not do is refused by name: nothing is accepted and then ignored.

Null counts as absent everywhere, and a parameter that is not there yet may be sent with the value that changes nothing.
"""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from serve.http.body import Body, Text, invalid
from serve.http.constraints import (
    Constraint,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    choice_constraint,
    grammar_constraint,
    json_constraint,
    regex_constraint,
)
from serve.http.conversation import Message, NamedChoice, Tool, ToolChoice

# Parameters of other servers, each with its values that ask for nothing.
NOT_THERE: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "prompt_logprobs": (),
}
# Of one kind of completion only; the other may hear what asks for nothing.
NOT_THERE_IN_CHATS = {"echo": (False,), "best_of": (1,)}
NOT_THERE_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "separate_reasoning": (True, False),
}


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False


class SamplingBody(Body):
    """What both kinds of completion take."""

    model: Text | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] = Field({})
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Text | list[Text] = Field([])
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = Field([])
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    min_tokens: Annotated[int, Field(ge=0)] = 0
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    rid: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    json_schema: Text | None = None
    regex: Text | None = None
    ebnf: Text | None = None
    guided_json: Schema | Text | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None
    structured_outputs: StructuredOutputs | None = None
    _constraint: Constraint | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_there(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        harmless_ones = NOT_THERE | cls.not_there()
        for name, harmless in harmless_ones.items():
            value = data.get(name)
            if value is not None and value not in harmless:
                raise PydanticCustomError("unsupported", "{param} is not supported here: leave it out", {"param": name})
        return {key: value for key, value in data.items() if key not in harmless_ones}

    @model_validator(mode="after")
    def _check_together(self) -> "SamplingBody":
        if len(self.stop_strings) > 16 or "" in self.stop_strings:
            raise invalid("stop", "stop takes up to 16 strings, none of them empty")
        if not all(key.isascii() and key.isdigit() for key in self.logit_bias):
            raise invalid("logit_bias", "logit_bias maps token ids, as strings, to numbers")
        demands = list(self._demands())
        if len(demands) > 1:
            fields = " and ".join(demand.field for demand in demands)
            raise invalid(demands[1].field, f"{fields} cannot be met together: ask for one of them")
        self._constraint = demands[0] if demands else None
        return self

    def _demands(self) -> Iterator[Constraint]:
        openai, vllm = self.response_format, self.structured_outputs
        if openai.type == "json_object":
            yield json_constraint("response_format", {"type": "object"})
        elif openai.type == "json_schema":
            if openai.json_schema is None:
                raise invalid("response_format", 'response_format {"type": "json_schema"} needs json_schema')
            yield json_constraint("response_format", openai.json_schema.schema_)
        for field, makes, value in (
            ("json_schema", json_constraint, self.json_schema),
            ("regex", regex_constraint, self.regex),
            ("ebnf", grammar_constraint, self.ebnf),
            ("guided_json", json_constraint, self.guided_json),
            ("guided_regex", regex_constraint, self.guided_regex),
            ("guided_choice", choice_constraint, self.guided_choice),
            ("guided_grammar", grammar_constraint, self.guided_grammar),
            ("structured_outputs", json_constraint, vllm and vllm.json_),
            ("structured_outputs", regex_constraint, vllm and vllm.regex),
            ("structured_outputs", choice_constraint, vllm and vllm.choice),
            ("structured_outputs", grammar_constraint, vllm and vllm.grammar),
        ):
            if value is not None:
                yield makes(field, value)  # pyright: ignore[reportArgumentType]  (each row has a value of its kind)

    @classmethod
    def not_there(cls) -> dict[str, tuple[Any, ...]]:
        """Parameters of the other kind of completion."""
        raise NotImplementedError

    @property
    def constraint(self) -> Constraint | None:
        """What the text must look like."""
        return self._constraint

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def most_tokens(self) -> int | None:
        """The caller's bound on a completion."""
        return self.max_tokens

    @property
    def top_alternatives(self) -> int | None:
        """Alternatives to report per token; None for no log-probabilities."""
        raise NotImplementedError


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise invalid("best_of", f"best_of={self.best_of} must be n={self.n}: all that is sampled is returned")
        if self.echo and self.logprobs is not None:
            raise invalid("echo", "echo with logprobs would need those of the prompt, which are not offered")
        return self

    @classmethod
    def not_there(cls) -> dict[str, tuple[Any, ...]]:
        return NOT_THERE_IN_COMPLETIONS

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several prompts as several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return self.prompt  # pyright: ignore[reportReturnType]  (the case of a flat list of ids is done)

    @property
    def most_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top_alternatives(self) -> int | None:
        return self.logprobs


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[Text, Any] = Field({})
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    separate_reasoning: bool = True
    tools: Annotated[list[Tool], Field(max_length=128)] = Field([])
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs=true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise invalid("tools", "two tools have the same name")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "tool_choice demands a call, and there are no tools")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise invalid("tool_choice", f"tool_choice names {self.tool_choice.function.name!r}, which is no tool")
        if self.demanded and self.constraint:
            raise invalid(self.constraint.field, f"{self.constraint.field} cannot be met by a call that is demanded")
        return self

    @classmethod
    def not_there(cls) -> dict[str, tuple[Any, ...]]:
        return NOT_THERE_IN_CHATS

    @property
    def offered(self) -> list[Tool]:
        """Tools that the model hears of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def demanded(self) -> list[Tool]:
        """Tools of which one must be called; empty if none need be."""
        if isinstance(self.tool_choice, NamedChoice):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TokenizeRequest(Body):
    """POST /tokenize: text as /v1/completions reads it, or messages as the chat does."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] = Field([])
    tools: list[Tool] = Field([])
    chat_template_kwargs: dict[Text, Any] = Field({})


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: list[int]


class AbortRequest(Body):
    """POST /abort_request: `rid` is the `rid` of the request, or the id of its answer."""

    rid: str = ""
    abort_all: bool = False
