"""What may be asked. Whatever this server would not do is refused by name: nothing is accepted and then ignored.

Null counts as absent everywhere, and a parameter that is not there yet may be sent with the value that changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Parameters of other servers, each with its values that ask for nothing.
NOT_THERE: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
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
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "prompt_logprobs": (),
}


def _check_text(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]


class Body(BaseModel):
    """A JSON object whose every member is understood."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False


class SamplingBody(Body):
    """What both kinds of completion take."""

    model: Text | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Text | list[Text] = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    rid: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_there(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, harmless in NOT_THERE.items():
            value = data.get(name)
            if value is not None and value not in harmless:
                raise PydanticCustomError("unsupported", "{param} is not supported yet: leave it out", {"param": name})
        return {key: value for key, value in data.items() if key not in NOT_THERE}

    @model_validator(mode="after")
    def _check_stops(self) -> "SamplingBody":
        if len(self.stop_strings) > 16 or "" in self.stop_strings:
            raise ValueError("stop takes up to 16 strings, none of them empty")
        return self

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


class TextPart(Body):
    """A stretch of a message's text."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]
    reasoning_content: Text | None = None
    name: Text | None = None

    def turn(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        optional = {"reasoning_content": self.reasoning_content, "name": self.name}
        return {"role": self.role, "content": text} | {k: v for k, v in optional.items() if v is not None}


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[Text, Any] = {}
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

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
    messages: list[Message] = []
    chat_template_kwargs: dict[Text, Any] = {}


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: list[int]


class AbortRequest(Body):
    """POST /abort_request: `rid` is the `rid` of the request, or the id of its answer."""

    rid: str = ""
    abort_all: bool = False
