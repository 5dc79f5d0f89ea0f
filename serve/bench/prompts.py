"""Prompts from a file."""

import json
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
Prompt = str | Messages

# ShareGPT's names for who speaks.
_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


def read_prompts(path: Path, *, as_chat: bool) -> list[Prompt]:
    """Reads JSONL (`.jsonl`: "prompt", or "messages", or ShareGPT's "conversations"), or text with one prompt a line.

    Of a conversation everything before its last answer is asked. With `as_chat` a plain prompt becomes a user message.

    Raises:
        ValueError: a line is neither, or the file holds no prompt.
        OSError: the file cannot be read.
    """
    try:
        # Not splitlines(), which also cuts at form feeds and at Unicode's separators.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = _from_json(line) if path.suffix == ".jsonl" else line.rstrip("\r")
            if isinstance(prompt, list) and not as_chat:
                raise ValueError("holds a conversation, which takes --chat")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        prompts.append([{"role": "user", "content": prompt}] if as_chat and isinstance(prompt, str) else prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _from_json(line: str) -> Prompt:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {line[:40]!r}")
    if isinstance(data.get("prompt"), str) and data["prompt"]:
        return data["prompt"]
    turns = data.get("messages") or data.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(f'expected "prompt", "messages" or "conversations", got {sorted(data)}')
    messages = [_message(turn) for turn in turns]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    asked = messages[: answers[-1]] if answers and answers[-1] == len(messages) - 1 else messages
    if not asked or asked[-1]["role"] != "user":
        raise ValueError("the conversation has no user turn to answer")
    return asked


def _message(turn: Any) -> dict[str, str]:
    if isinstance(turn, dict):
        role = _ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if role is not None and isinstance(content, str):
            return {"role": role, "content": content}
    raise ValueError(f'a turn is {{"role", "content"}} with role in {sorted(set(_ROLES.values()))}, got {turn!r:.80}')
