"""Files on disk -> distinct documents, each on one side of the train/held-out split. Knows nothing of tokens.

The whole text is held in memory: this is for corpora of up to a few gigabytes.
"""

import dataclasses
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.data.settings import DatasetSettings

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
CHAT_SUFFIX = ".jsonl"
# Never a corpus: other people's packages, caches, compiled modules.
NEVER_READ = frozenset({"__pycache__", "dist-packages", "lib-dynload", "node_modules", "site-packages"})


@dataclasses.dataclass(frozen=True)
class TextFile:
    """One file of plain text or code.

    Attributes:
        name: where it was found, relative to its root.
        text: its content; line ends are a single line feed.
    """

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One line of a chat file.

    Attributes:
        name: `file:line`.
        messages: each with the texts `role` and `content`.
    """

    name: str
    messages: tuple[dict[str, str], ...]


Document = TextFile | Conversation


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Distinct documents in a deterministic order.

    Attributes:
        train: documents to learn from.
        heldout: documents never shown to the tokenizer or the model.
        skipped: what was left out, by reason.
        num_bytes: UTF-8 size of both sides.
        sha256: hash of both sides.
    """

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    skipped: Mapping[str, int]
    num_bytes: int
    sha256: str


def read_corpus(settings: DatasetSettings) -> Corpus:
    """Reads, drops exact duplicates and splits.

    The side of a document follows from the SHA-256 of its content alone, so no later addition to the corpus
    moves a document across, and copies of one document cannot end up on both sides. Near-duplicates can.

    Args:
        settings: `roots`, `excluded_folders`, `max_file_bytes` and `heldout_fraction` are used.

    Raises:
        ValueError: a root does not exist, a chat line is malformed, or one side of the split came out empty.
    """
    skipped: Counter[str] = Counter()
    sides: tuple[list[Document], list[Document]] = ([], [])
    seen: set[bytes] = set()
    total, num_bytes = hashlib.sha256(), 0
    for document in _documents(settings, skipped):
        content = _content(document)
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(digest)
        total.update(digest)
        num_bytes += len(content)
        is_heldout = int.from_bytes(digest[:8], "big") / 2**64 < settings.heldout_fraction
        sides[is_heldout].append(document)
    train, heldout = sides
    if not train or not heldout:
        raise ValueError(
            f"{len(train)} documents to train on, {len(heldout)} held out: each side needs one; "
            f"read from {[str(root) for root in _roots(settings)]}; skipped: {dict(skipped)}; "
            f"give more text or another heldout_fraction (now {settings.heldout_fraction})"
        )
    return Corpus(tuple(train), tuple(heldout), dict(sorted(skipped.items())), num_bytes, total.hexdigest())


def _roots(settings: DatasetSettings) -> list[Path]:
    roots = [Path(root).expanduser() for root in settings.roots]
    roots = roots or [Path(sysconfig.get_paths()["stdlib"])]
    for root in roots:
        if not root.exists():
            raise ValueError(f"root {root} does not exist; give folders or files of text")
    return roots


def _documents(settings: DatasetSettings, skipped: Counter[str]) -> Iterator[Document]:
    for root in _roots(settings):
        for path in _files(root, settings.excluded_folders):
            name = path.name if root.is_file() else path.relative_to(root).as_posix()
            if path.suffix == CHAT_SUFFIX:
                yield from _conversations(path, name)
                continue
            text = _text(path, settings.max_file_bytes, skipped)
            if text is not None:
                yield TextFile(name, text)


def _files(root: Path, excluded_folders: tuple[str, ...]) -> list[Path]:
    """Readable files below `root`, sorted by relative path: directory order is the file system's whim."""
    if root.is_file():
        if root.suffix not in (*TEXT_SUFFIXES, CHAT_SUFFIX):
            raise ValueError(f"root {root} ends in {root.suffix!r}; allowed: {(*TEXT_SUFFIXES, CHAT_SUFFIX)}")
        return [root]
    found = []
    for folder, children, names in os.walk(root):
        children[:] = [
            child
            for child in children
            if child not in NEVER_READ and child not in excluded_folders and not child.startswith(".")
        ]
        found += [Path(folder, name) for name in names if name.endswith((*TEXT_SUFFIXES, CHAT_SUFFIX))]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _text(path: Path, max_bytes: int, skipped: Counter[str]) -> str | None:
    try:
        if path.stat().st_size > max_bytes:
            skipped["too large"] += 1
            return None
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None
    except OSError:
        skipped["unreadable"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    return text.replace("\r\n", "\n")


def _conversations(path: Path, name: str) -> Iterator[Conversation]:
    # Not splitlines(): it also breaks at U+2028 and U+0085, which JSON texts may hold unescaped.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            yield Conversation(f"{name}:{number}", _messages(line, where=f"{path}:{number}"))


def _messages(line: str, *, where: str) -> tuple[dict[str, str], ...]:
    expected = 'expected {"messages": [{"role": "user", "content": "..."}, ...]}'
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}; {expected}") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: no list of messages; {expected}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: a message is {message!r}, with no text role or content; {expected}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _content(document: Document) -> bytes:
    if isinstance(document, TextFile):
        return document.text.encode()
    # ASCII escapes, because a JSON string may spell half a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(document.messages).encode()
