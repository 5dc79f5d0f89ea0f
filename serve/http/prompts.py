"""From messages to token ids, such that what a user writes stays text."""

import inspect
import uuid
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from idlm_jax.decoding.prompts import encode_prompt
from idlm_jax.model.language_model import LanguageModel
from serve.http.errors import ApiError
from serve.http.schemas import Message

_OURS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def encode_chat(lm: LanguageModel, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
    """Token ids of a conversation, up to where the assistant answers.

    Text that spells a special token is not read as one: a user cannot end his turn and begin another's.

    Args:
        lm: the model, whose tokenizer has a chat template.
        messages: the turns.
        template_kwargs: variables of the template, such as Qwen3's `enable_thinking`.

    Raises:
        ApiError: there is no template, it refuses the turns, or a variable is not one of the template's.
    """
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    if not tokenizer.chat_template:
        raise ApiError(400, "this model has no chat template: use /v1/completions")
    if taken := sorted(_OURS & set(template_kwargs)):
        raise ApiError(400, f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs")
    # A spelled-out special token is cut in two by a mark, which survives the template and is cut at in turn.
    mark = uuid.uuid4().hex
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    turns = [{key: _cut(text, special, mark) for key, text in message.turn().items()} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **template_kwargs)
        str(text).encode()  # a template's variable may hold half of a surrogate pair
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
    return [token for piece in str(text).split(mark) if piece for token in encode_prompt(lm, piece, 0)]


def _cut(text: str, special: Sequence[str], mark: str) -> str:
    for each in special:
        if len(each) > 1:
            text = text.replace(each, each[:1] + mark + each[1:])
    return text
