"""What a chat is made of: turns, and the tools that the model may call."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serve.http.body import Body, Text, invalid

# OpenAI's own rule. Such a name needs no escaping, in JSON or anywhere else.
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Body):
    """A stretch of a message's text."""

    type: Literal["text"]
    text: Text


class CalledFunction(Body):
    """What was called, with arguments as JSON in a string."""

    name: FunctionName
    arguments: Text = "{}"

    @model_validator(mode="after")
    def _check_arguments(self) -> "CalledFunction":
        try:
            is_object = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise invalid("messages", f"the arguments of the call of {self.name!r} are not a JSON object")
        return self


class ToolCall(Body):
    """A call that the assistant made, as it was answered before."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    reasoning_content: Text | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] = Field([])
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise invalid("messages", f"tool_calls belong to the assistant, not to {self.role!r}")
        if self.content is None and not self.tool_calls:
            raise invalid("messages", f"a message of {self.role!r} needs content")
        return self

    def turn(self) -> dict[str, Any]:
        """The turn as chat templates take it: text, possibly empty, and arguments of calls as objects."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        calls = [
            {"id": call.id, "type": "function", "function": {"name": name, "arguments": json.loads(arguments)}}
            for call in self.tool_calls
            for name, arguments in [(call.function.name, call.function.arguments)]
        ]
        optional: dict[str, Any] = {"reasoning_content": self.reasoning_content, "name": self.name}
        optional |= {"tool_call_id": self.tool_call_id, "tool_calls": calls or None}
        return {"role": self.role, "content": text} | {k: v for k, v in optional.items() if v is not None}


class Function(Body):
    """What may be called; `parameters` is a JSON schema. Arguments always follow it when a call is demanded."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool as OpenAI's clients describe it."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    """A function by its name."""

    name: FunctionName


class NamedChoice(Body):
    """Demands a call of one function."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice
