"""Named groups of prompts from the command line: files of prompts, and held-out rows of datasets."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from idlm_jax.decoding.prompts import Prompt

_EXPECTED = '{"prompt": "text" or [ids]} or {"messages": [{"role": "user", "content": "text"}, ...]}'


@dataclasses.dataclass(frozen=True)
class Chat:
    """What was said before the answer that is to be made; each message has the texts `role` and `content`."""

    messages: list[dict[str, str]]


def named_paths(values: Sequence[str], option: str, taken: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """Paths by domain, from NAME=PATH each; a bare path is named after its file or folder.

    Args:
        values: as given.
        option: what gave them, for messages.
        taken: names that another option gave.

    Raises:
        ValueError: a name or a path is empty, or a name comes twice.
        FileNotFoundError: nothing is at a path.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, equals, text = value.partition("=")
        path = Path(text if equals else value)
        if not equals:
            name = path.resolve().name if path.is_dir() else path.stem
        if not name or (equals and not text):
            raise ValueError(f"{option} {value}: expected NAME=PATH, or a path alone")
        if name in found or name in (taken or {}):
            raise ValueError(f"{option} {value}: the domain {name!r} is given twice; name it otherwise with NAME=PATH")
        if not path.exists():
            raise FileNotFoundError(f"{option} {value}: there is no {path}")
        found[name] = path
    return found


def read_prompt_file(path: Path) -> list[Prompt | Chat]:
    """Prompts of a JSONL file, an object a line; of a chat, everything before its last answer.

    Raises:
        ValueError: a line is something else, named by its number, or the file holds no prompt.
        OSError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # splitlines() would cut at U+2028, which JSON may hold
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    found = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompt; expected lines of {_EXPECTED}")
    return found


def _prompt(line: str, where: str) -> Prompt | Chat:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}; expected {_EXPECTED}") from None
    match record:
        case {"prompt": str() | list() as prompt} if prompt:
            if isinstance(prompt, str) or all(type(token) is int for token in prompt):
                return prompt
        case {"messages": list() as messages}:
            if asked := _asked(messages):
                return Chat(asked)
            raise ValueError(f"{where}: no turn of a user to answer; expected {_EXPECTED}")
    raise ValueError(f"{where}: no prompt; expected {_EXPECTED}")


def _asked(messages: list[Any]) -> list[dict[str, str]]:
    """The messages before the last answer; none if no user asks."""
    if not all(isinstance(each, dict) and isinstance(each.get("content"), str) for each in messages):
        return []
    asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    return asked if asked and asked[-1].get("role") == "user" else []


def rendered(prompts: Sequence[Prompt | Chat], tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
    """Chats as text, by the model's chat template; everything else as it is.

    Raises:
        ValueError: there is a chat and no template.
    """
    found: list[Prompt] = []
    for prompt in prompts:
        if isinstance(prompt, Chat):
            if tokenizer is None or tokenizer.chat_template is None:
                raise ValueError("a prompt is a chat, and the model folder has no chat template")
            prompt = str(tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True))
        found.append(prompt)
    return found


def spread(prompts: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, spread evenly."""
    return list(prompts[:: max(1, len(prompts) // most)][:most])
