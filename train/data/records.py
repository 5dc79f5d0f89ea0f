"""One JSON object -> one document: a chat, or tokens that somebody else made. In JSONL and ArrayRecord alike.

A record has exactly one of the keys `messages`, `tokens` and `input_ids`; `docs/data.md` shows all three. Keys
not named there are ignored.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int, Shaped

JSONL_SUFFIX = ".jsonl"
# name.arrayrecord, name.array_record, and shards: name.array_record-00000-of-00004.
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_KINDS = ("messages", "tokens", "input_ids")
_EXPECTED = 'expected {"messages": [{"role": "user", "content": "..."}, ...]}'
# Label of a position without a loss, in transformers.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A chat.

    Attributes:
        name: `file:line`.
        messages: each with the texts `role` and `content`.
    """

    name: str
    messages: tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSequence:
    """A document that is tokenized already; nothing is added to it.

    Attributes:
        name: `file:line`.
        tokens: ids, not negative.
        is_response: True where the token is supervised.
    """

    name: str
    tokens: Int[np.ndarray, " T"]
    is_response: Bool[np.ndarray, " T"]


def is_record_file(name: str) -> bool:
    """Whether `read_records` reads a file of this name."""
    return name.endswith(JSONL_SUFFIX) or _ARRAY_RECORD.search(name) is not None


def read_records(path: Path, name: str) -> Iterator[Conversation | TokenSequence]:
    """The documents of a `.jsonl` file (one object a line) or an ArrayRecord file (one object a record, UTF-8).

    Args:
        path: the file.
        name: what the documents are named after.

    Raises:
        ValueError: a record is broken; names the file and the line, counted from 1, or the record, from 0.
    """
    lines = read_lines(path) if path.name.endswith(JSONL_SUFFIX) else _read_array_record(path)
    for number, line in lines:
        yield parse_record(line, name=f"{name}:{number}", where=f"{path}:{number}")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a JSONL file that are not blank, numbered from 1.

    Raises:
        ValueError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        # Bytes break at line feeds only; text would also break at U+2028, which a JSON string may hold unescaped.
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _decode(line, where=f"{path}:{number}")


def _read_array_record(path: Path) -> Iterator[tuple[int, str]]:
    reader: Any = grain.sources.ArrayRecordDataSource  # its hints come from a stand-in for Windows
    try:
        with reader(str(path)) as source:
            for number in range(len(source)):
                yield number, _decode(source[number], where=f"{path}:{number}")
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: no readable ArrayRecord file: {error}") from error


def _decode(raw: bytes, *, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None


def parse_record(text: str, *, name: str, where: str) -> Conversation | TokenSequence:
    """One document from its JSON text.

    Args:
        text: a JSON object.
        name: of the document.
        where: file and line, for messages.

    Raises:
        ValueError: no JSON, no document, or one that contradicts itself.
    """
    try:
        record: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}; {_EXPECTED}") from None
    kinds = [kind for kind in _KINDS if isinstance(record, dict) and kind in record]
    if len(kinds) > 1:
        raise ValueError(f"{where}: holds {' and '.join(kinds)}; give one of them")
    match kinds:
        case ["tokens"]:
            return _from_tokens(record, name, where)
        case ["input_ids"]:
            return _from_input_ids(record, name, where)
        case _:
            return Conversation(name, _messages(record, where))


def _messages(record: Any, where: str) -> tuple[dict[str, str], ...]:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: no list of messages; {_EXPECTED}, or tokens, or input_ids")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: a message is {message!r}, with no text role or content; {_EXPECTED}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _from_tokens(record: dict[str, Any], name: str, where: str) -> TokenSequence:
    tokens = _ids(record, "tokens", where)
    if record.get("is_response") is None:
        return TokenSequence(name, tokens, np.ones(len(tokens), np.bool_))
    flags = _values(record, "is_response", where, length=len(tokens))
    if not (flags.dtype.kind in "bi" and np.isin(flags, (0, 1)).all()):
        raise ValueError(f"{where}: is_response must hold true and false only")
    return TokenSequence(name, tokens, flags.astype(np.bool_))


def _from_input_ids(record: dict[str, Any], name: str, where: str) -> TokenSequence:
    tokens = _ids(record, "input_ids", where)
    # Padding would be packed as if it were text, and attended to.
    if 0 in (record.get("attention_mask") or ()):
        raise ValueError(f"{where}: attention_mask holds zeros; give input_ids without padding")
    if record.get("labels") is None:
        return TokenSequence(name, tokens, np.ones(len(tokens), np.bool_))
    labels = _values(record, "labels", where, length=len(tokens))
    is_response = np.asarray(labels != IGNORED)
    if labels.dtype.kind != "i" or (labels[is_response] != tokens[is_response]).any():
        raise ValueError(
            f"{where}: every label must be {IGNORED} or the id at the same place in input_ids (not shifted by one)"
        )
    return TokenSequence(name, tokens, is_response)


def _ids(record: dict[str, Any], key: str, where: str) -> Int[np.ndarray, " T"]:
    ids = _values(record, key, where)
    if not (ids.dtype.kind == "i" and ids.min() >= 0 and ids.max() < 2**31):
        raise ValueError(f"{where}: {key} must be a list of ids, whole numbers from 0 on")
    return ids.astype(np.int32)


def _values(record: dict[str, Any], key: str, where: str, length: int | None = None) -> Shaped[np.ndarray, " T"]:
    values = record[key]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: {key} must be a list, and not empty")
    if any(isinstance(value, list) for value in values):
        raise ValueError(f"{where}: {key} is a nested list; give one document a record")
    if length is not None and len(values) != length:
        raise ValueError(f"{where}: {len(values)} values of {key} for {length} tokens")
    return np.asarray(values)
