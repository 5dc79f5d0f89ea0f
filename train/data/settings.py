"""What a dataset is built from, and the report that `meta.json` holds."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal, get_args

from pydantic import TypeAdapter, ValidationError

TooLong = Literal["cut", "drop", "error"]
FORMAT_VERSION = 1
META_NAME = "meta.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Everything that, with the text itself, decides the content of a dataset folder.

    Attributes:
        roots: folders or files to read (`.py .md .rst .txt`, and chats or tokens in `.jsonl` or
            `.arrayrecord`); empty means the source of the Python standard library that runs this program.
        max_seq_len: tokens in a packed row, L.
        vocab_size: ids of a byte-level BPE to train on the train side; None when `tokenizer` is given.
        tokenizer: folder of an existing fast Hugging Face tokenizer; None when `vocab_size` is given.
        heldout_fraction: expected share of documents (files and conversations) on the held-out side.
        excluded_folders: folder names to pass over at any depth; the default leaves test suites out.
        max_file_bytes: larger text files are skipped, and counted: they are tables more often than prose.
            Files of records have no limit.
        seed: order in which documents are packed.
        too_long: what becomes of a document of more than `max_seq_len` tokens: "cut" (text into pieces, chats
            at the end), "drop", or "error".
    """

    roots: tuple[str, ...] = ()
    max_seq_len: int = 256
    vocab_size: int | None = None
    tokenizer: str | None = None
    heldout_fraction: float = 0.03
    excluded_folders: tuple[str, ...] = ("idle_test", "idlelib", "test", "tests")
    max_file_bytes: int = 1_000_000
    seed: int = 0
    too_long: TooLong = "cut"

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError(
                f"give exactly one of vocab_size (train a tokenizer) and tokenizer (reuse a folder); "
                f"received {self.vocab_size=}, {self.tokenizer=}"
            )
        # 256 bytes and four special tokens come before the first merge.
        if self.vocab_size is not None and self.vocab_size < 260:
            raise ValueError(f"{self.vocab_size=} must be at least 260: 256 bytes and 4 special tokens")
        if self.max_seq_len < 2:
            raise ValueError(f"{self.max_seq_len=} must be at least 2: a token and the one it predicts")
        if not 0 < self.heldout_fraction <= 0.5:
            raise ValueError(f"{self.heldout_fraction=} must lie in (0, 0.5]")
        if self.max_file_bytes < 1:
            raise ValueError(f"{self.max_file_bytes=} must be positive")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"{self.seed=} must lie in [0, 2**32), the range of Grain's shuffle")
        if self.too_long not in get_args(TooLong):
            raise ValueError(f"{self.too_long=} must be one of {', '.join(get_args(TooLong))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitReport:
    """Counts of one side of the split.

    Attributes:
        documents: distinct files and conversations.
        chunks: pieces of at most `max_seq_len` tokens that were packed; each is a document to the model.
        rows: packed rows.
        tokens: tokens in them, padding excluded.
        response_tokens: tokens that may be masked and are supervised.
        fill: `tokens / (rows * max_seq_len)`.
        truncated: conversations cut at `max_seq_len`.
        dropped: documents of which nothing supervised was left.
        tokens_read: tokens of all documents, `tokens + sum(tokens_lost.values())`; 0 in folders built before
            this was counted.
        tokens_lost: tokens in no row, by reason.
    """

    documents: int
    chunks: int
    rows: int
    tokens: int
    response_tokens: int
    fill: float
    truncated: int
    dropped: int
    tokens_read: int = 0
    tokens_lost: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What was built, from what, by what. The same object is `meta.json`.

    Attributes:
        fingerprint: hash of the settings and of the text read; equal fingerprints mean an equal dataset.
        settings: as given.
        corpus_sha256: hash of the distinct documents, in the order read.
        corpus_bytes: their size in bytes.
        skipped: files and conversations left out, by reason.
        vocab_size: ids of the tokenizer, added tokens included.
        max_token_id: largest id in either side; a model needs more rows than this.
        train: counts of the train side.
        heldout: counts of the held-out side.
        versions: of Python and of the libraries that shaped the result.
        build_s: seconds the build took.
        was_reused: this call found the folder already built. Always false in `meta.json`.
        format_version: layout of the folder.
    """

    fingerprint: str
    settings: DatasetSettings
    corpus_sha256: str
    corpus_bytes: int
    skipped: dict[str, int]
    vocab_size: int
    max_token_id: int
    train: SplitReport
    heldout: SplitReport
    versions: dict[str, str]
    build_s: float
    was_reused: bool = False
    format_version: int = FORMAT_VERSION


def fingerprint(settings: DatasetSettings, corpus_sha256: str, tokenizer_sha256: str) -> str:
    """Hash of what decides the dataset.

    Paths do not enter, contents do: a moved corpus is the same corpus, an edited one is not.

    Args:
        settings: of the build.
        corpus_sha256: hash of the documents.
        tokenizer_sha256: hash of the given tokenizer's files; empty when one is trained.

    Returns:
        64 hexadecimal digits.
    """
    decisive = dataclasses.asdict(settings) | {
        "roots": corpus_sha256,
        "tokenizer": tokenizer_sha256,
        "format_version": FORMAT_VERSION,
    }
    if settings.too_long == "cut":
        del decisive["too_long"]  # folders built before there was a choice are still what these settings build
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def write_report(report: DatasetReport, dataset_dir: Path) -> None:
    """Writes `meta.json`."""
    text = json.dumps(dataclasses.asdict(report), indent=2, sort_keys=True)
    (dataset_dir / META_NAME).write_text(text + "\n", encoding="utf-8")


def read_report(dataset_dir: str | Path) -> DatasetReport:
    """Reads `meta.json` of a dataset folder.

    Raises:
        ValueError: the folder holds no dataset, or one of another format version.
    """
    path = Path(dataset_dir) / META_NAME
    if not path.is_file():
        raise ValueError(f"{dataset_dir} is no dataset folder (no {META_NAME}); see idlm pack --help")
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={raw.get('format_version')!r}, this program reads {FORMAT_VERSION}: "
            "build the dataset again in another folder"
        )
    try:
        return TypeAdapter(DatasetReport).validate_python(raw)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
