"""Text -> dataset folder: `meta.json`, `tokenizer/`, `train/*.npy`, `heldout/*.npy`."""

import importlib.metadata
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from train.data.corpus import Corpus, TextFile, read_corpus
from train.data.encode import EncodedDocuments, encode_documents
from train.data.packing import PackedRows, pack_chunks, save_rows
from train.data.records import Conversation, TokenSequence
from train.data.settings import (
    META_NAME,
    DatasetReport,
    DatasetSettings,
    SplitReport,
    fingerprint,
    read_report,
    write_report,
)
from train.data.tokenizer import folder_sha256, load_tokenizer, train_tokenizer


def build_dataset(settings: DatasetSettings, out_dir: str | Path, *, show_progress: bool = False) -> DatasetReport:
    """Builds `out_dir`, or finds it built already.

    The folder appears under its name only when it is complete. Equal settings and text give equal arrays.

    Args:
        settings: see `DatasetSettings`.
        out_dir: the dataset folder; a new or empty one, or one that the same settings and text built.
        show_progress: draw bars on stderr.

    Raises:
        ValueError: `out_dir` holds something else; the corpus, the tokenizer or a conversation is unusable.
    """
    start = time.perf_counter()
    out_dir = Path(out_dir)
    given = "" if settings.tokenizer is None else folder_sha256(settings.tokenizer)
    corpus = read_corpus(settings)
    wanted = fingerprint(settings, corpus.sha256, given)
    existing = _existing(out_dir, wanted, settings, corpus)
    if existing is not None:
        return replace(existing, was_reused=True)

    tokenizer = _tokenizer(settings, corpus, show_progress)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
    try:
        tokenizer.save_pretrained(partial / "tokenizer")
        skipped, max_token_id, splits = Counter(corpus.skipped), 0, {}
        for name, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
            encoded = encode_documents(
                documents,
                tokenizer,
                max_seq_len=settings.max_seq_len,
                too_long=settings.too_long,
                show_progress=show_progress,
                title=f"encode {name}",
            )
            if not encoded.chunks:
                raise ValueError(f"nothing to supervise in {len(documents)} {name} documents: {encoded.dropped}")
            rows = pack_chunks(
                encoded.chunks,
                max_seq_len=settings.max_seq_len,
                seed=settings.seed,
                show_progress=show_progress,
                title=f"pack {name}",
            )
            save_rows(rows, partial / name)
            skipped.update(encoded.dropped)
            max_token_id = max(max_token_id, int(rows.tokens.max()))
            splits[name] = _split_report(len(documents), encoded, rows)
        report = DatasetReport(
            fingerprint=wanted,
            settings=settings,
            corpus_sha256=corpus.sha256,
            corpus_bytes=corpus.num_bytes,
            skipped=dict(sorted(skipped.items())),
            vocab_size=len(tokenizer),
            max_token_id=max_token_id,
            train=splits["train"],
            heldout=splits["heldout"],
            versions=_versions(),
            build_s=round(time.perf_counter() - start, 2),
        )
        write_report(report, partial)
        partial.chmod(0o755)  # mkdtemp makes it private to the user.
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _existing(out_dir: Path, wanted: str, settings: DatasetSettings, corpus: Corpus) -> DatasetReport | None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not (out_dir / META_NAME).is_file():
        raise ValueError(f"{out_dir} exists and is no dataset folder (no {META_NAME}); choose another")
    report = read_report(out_dir)
    if report.fingerprint == wanted:
        return report
    changed = [
        f"{name}={value!r} (now {getattr(settings, name)!r})"
        for name, value in vars(report.settings).items()
        if value != getattr(settings, name)
    ]
    if report.corpus_sha256 != corpus.sha256:
        changed.append(f"text of {report.corpus_bytes} bytes (now {corpus.num_bytes}, or edited)")
    reason = "; ".join(changed) or "another tokenizer under the same path"
    raise ValueError(f"{out_dir} was built with {reason}: choose another folder, or delete this one")


def _tokenizer(settings: DatasetSettings, corpus: Corpus, show_progress: bool) -> PreTrainedTokenizerFast:
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    assert settings.vocab_size is not None  # DatasetSettings: exactly one of the two.
    for document in (*corpus.train, *corpus.heldout):
        if isinstance(document, TokenSequence):
            raise ValueError(f"{document.name} is tokenized already: give the tokenizer that made it, not vocab_size")
    return train_tokenizer(_texts(corpus), vocab_size=settings.vocab_size, show_progress=show_progress)


def _texts(corpus: Corpus) -> Iterator[str]:
    for document in corpus.train:
        if isinstance(document, TextFile):
            yield document.text
        elif isinstance(document, Conversation):
            yield from (message["content"] for message in document.messages)


def _split_report(num_documents: int, encoded: EncodedDocuments, rows: PackedRows) -> SplitReport:
    return SplitReport(
        documents=num_documents,
        chunks=len(encoded.chunks),
        rows=rows.num_rows,
        tokens=rows.num_tokens,
        response_tokens=int(np.count_nonzero(rows.is_response)),
        fill=round(rows.num_tokens / rows.tokens.size, 4),
        truncated=encoded.truncated,
        dropped=sum(encoded.dropped.values()),
        tokens_read=encoded.num_tokens,
        tokens_lost=encoded.lost_tokens,
    )


def _versions() -> dict[str, str]:
    packages = ("grain", "numpy", "tokenizers", "transformers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
