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

from train.data.records import Conversation, TokenSequence, is_record_file, read_records
from train.data.settings import DatasetSettings

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
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


Document = TextFile | Conversation | TokenSequence


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
        ValueError: a root does not exist or is no UTF-8, a record is malformed, or one side of the split came
            out empty.
        OSError: a root or a file of records cannot be read.
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
            if is_record_file(path.name):
                yield from read_records(path, name)
                continue
            text = _text(path, settings.max_file_bytes, skipped, is_named=path == root)
            if text is not None:
                yield TextFile(name, text)


def _files(root: Path, excluded_folders: tuple[str, ...]) -> list[Path]:
    """Readable files below `root`, sorted by relative path: directory order is the file system's whim."""
    if root.is_file():
        if not _is_readable(root.name):
            raise ValueError(f"root {root} ends in {root.suffix!r}; allowed: {TEXT_SUFFIXES}, .jsonl and .arrayrecord")
        return [root]
    found = []
    for folder, children, names in os.walk(root):
        children[:] = [
            child
            for child in children
            if child not in NEVER_READ and child not in excluded_folders and not child.startswith(".")
        ]
        found += [Path(folder, name) for name in names if _is_readable(name)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_readable(name: str) -> bool:
    return name.endswith(TEXT_SUFFIXES) or is_record_file(name)


def _text(path: Path, max_bytes: int, skipped: Counter[str], *, is_named: bool) -> str | None:
    """Text of one file; None, and counted, when a file that was found in a folder is unusable."""
    try:
        if path.stat().st_size > max_bytes:
            skipped["too large"] += 1
            return None
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if is_named:
            raise ValueError(f"root {path} is not UTF-8: {error.reason} at byte {error.start}") from None
        skipped["not UTF-8"] += 1
        return None
    except OSError:
        if is_named:
            raise
        skipped["unreadable"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    return text.replace("\r\n", "\n")


def _content(document: Document) -> bytes:
    if isinstance(document, TextFile):
        return document.text.encode()
    if isinstance(document, TokenSequence):
        return document.tokens.tobytes() + document.is_response.tobytes()
    # ASCII escapes, because a JSON string may spell half a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(document.messages).encode()
