"""From messages to token ids, such that what a user or a tool writes stays text."""

import inspect
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from idlm_jax.decoding.prompts import encode_prompt
from idlm_jax.model.language_model import LanguageModel
from serve.http.conversation import Message, Tool
from serve.http.errors import ApiError
from serve.http.reasoning import OPEN, Thinking, thinking_after

_OURS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class Prompt(NamedTuple):
    """What a completion continues.

    Attributes:
        token_ids: the prompt.
        thinking: where it leaves the model.
        may_think: whether the model may write a block of reasoning before its answer.
    """

    token_ids: list[int]
    thinking: Thinking = "free"
    may_think: bool = False


def encode_chat(
    lm: LanguageModel, messages: Sequence[Message], tools: Sequence[Tool], template_kwargs: dict[str, Any]
) -> Prompt:
    """A conversation up to where the assistant answers.

    Text that spells a special token is not read as one: nobody can end his turn and begin another's. In what a tool
    returned, that holds for all added tokens, so that it cannot end its response within the turn either.

    Args:
        lm: the model, whose tokenizer has a chat template.
        messages: the turns.
        tools: what the model may call.
        template_kwargs: variables of the template, such as Qwen3's `enable_thinking`.

    Raises:
        ApiError: there is no template, it refuses the turns or knows no tools, or a variable is not the template's.
    """
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    if not tokenizer.chat_template:
        raise ApiError(400, "this model has no chat template: use /v1/completions")
    if taken := sorted(_OURS & set(template_kwargs)):
        raise ApiError(400, f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs")
    # A spelled-out special token is cut in two by a mark, which survives the template and is cut at in turn.
    mark = uuid.uuid4().hex
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    turns = [
        _cut(message.turn(), [token.content for token in added] if message.role == "tool" else special, mark)
        for message in messages
    ]
    described = [_cut(tool.model_dump(exclude_unset=True), special, mark) for tool in tools]
    template = tokenizer.get_chat_template(tools=described or None)  # pyright: ignore[reportArgumentType]
    for param, is_used, variable in (
        ("tools", bool(tools), "tools"),
        ("messages", any(message.tool_calls for message in messages), "tool_calls"),
    ):
        if is_used and variable not in template:
            raise ApiError(400, f"this model's chat template knows no {variable}", param=param)
    try:
        text = str(
            tokenizer.apply_chat_template(
                turns,
                tools=described or None,  # pyright: ignore[reportArgumentType]
                tokenize=False,
                add_generation_prompt=True,
                **template_kwargs,
            )
        )
        text.encode()  # a template's variable may hold half of a surrogate pair
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
    ids = [token for piece in text.split(mark) if piece for token in encode_prompt(lm, piece, 0)]
    thinking = thinking_after(text)
    return Prompt(ids, thinking, thinking == "inside" or (thinking == "free" and OPEN in template))


def _cut(value: Any, tokens: Sequence[str], mark: str) -> Any:
    """The same JSON without a spelled-out token in any of its texts, names of members included."""
    if isinstance(value, dict):
        return {_cut(key, tokens, mark): _cut(each, tokens, mark) for key, each in value.items()}
    if isinstance(value, list):
        return [_cut(each, tokens, mark) for each in value]
    if isinstance(value, str):
        for token in tokens:
            if len(token) > 1:
                value = value.replace(token, token[:1] + mark + token[1:])
    return value
