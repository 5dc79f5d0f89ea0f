import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.train.data.conftest import write_corpus
from train.data import DatasetSettings, build_dataset, read_report
from train.data.corpus import TextFile, read_corpus
from train.data.packing import load_rows
from train.data.settings import fingerprint


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "meta.json"  # it holds the seconds the build took
    }


def documents_in(folder: Path, side: str) -> set[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = load_rows(folder / side)
    texts = set()
    for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True):
        texts |= {tokenizer.decode(tokens[segments == k].tolist()) for k in range(1, int(segments.max()) + 1)}
    return texts


def test_the_folder_holds_what_the_report_counts(dataset, settings):
    folder, report = dataset
    assert sorted(path.name for path in folder.iterdir()) == ["heldout", "meta.json", "tokenizer", "train"]
    assert read_report(folder) == report and report.settings == settings
    for side, counts in (("train", report.train), ("heldout", report.heldout)):
        rows = load_rows(folder / side)
        assert rows.tokens.shape == (counts.rows, settings.max_seq_len)
        assert counts.tokens == int((rows.segment_ids > 0).sum())
        assert counts.response_tokens == int(rows.is_response.sum()) < counts.tokens
        assert counts.fill == pytest.approx(counts.tokens / rows.tokens.size, abs=1e-4)
        assert counts.chunks == int(rows.segment_ids.max(axis=1).astype(np.int64).sum())
        assert counts.tokens_read == counts.tokens + sum(counts.tokens_lost.values())
        assert rows.tokens.max() <= report.max_token_id < report.vocab_size <= 320


def test_each_side_holds_the_text_of_its_own_documents_only(dataset, settings):
    folder, _ = dataset
    corpus = read_corpus(settings)
    for side, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
        expected = "".join(document.text for document in documents if isinstance(document, TextFile))
        pieces = [piece.removesuffix("<|endoftext|>") for piece in documents_in(folder, side)]
        files = [piece for piece in pieces if "<|im_start|>" not in piece]
        assert len(files) > 5 and all(piece in expected for piece in files)
        # Pieces are a set, so equal tails of two files count once: hence at least, not equal.
        assert sum(map(len, files)) > 0.95 * len(expected)


def test_building_twice_gives_the_same_bytes(dataset, settings, tmp_path):
    folder, report = dataset
    again = build_dataset(settings, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert again.fingerprint == report.fingerprint and not again.was_reused


def test_the_same_settings_find_the_folder_built(dataset, settings):
    folder, report = dataset
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = build_dataset(settings, folder)
    assert again == dataclasses.replace(report, was_reused=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_settings_in_a_built_folder_are_refused_by_name(dataset, settings):
    folder, _ = dataset
    with pytest.raises(ValueError, match=r"built with max_seq_len=64 \(now 32\): choose another folder"):
        build_dataset(dataclasses.replace(settings, max_seq_len=32), folder)


def test_edited_text_in_a_built_folder_is_refused_and_a_moved_corpus_is_not(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=20, chats=0)
    settings = DatasetSettings(roots=(str(corpus),), vocab_size=300, max_seq_len=64, heldout_fraction=0.3)
    build_dataset(settings, tmp_path / "set")
    moved = corpus.rename(tmp_path / "moved")
    settings = dataclasses.replace(settings, roots=(str(moved),))
    assert build_dataset(settings, tmp_path / "set").was_reused
    (moved / "more.py").write_text("more = True\n")
    with pytest.raises(ValueError, match=r"built with .*text of \d+ bytes \(now \d+, or edited\)"):
        build_dataset(settings, tmp_path / "set")


def test_a_folder_with_other_things_in_it_is_left_alone(settings, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is no dataset folder"):
        build_dataset(settings, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_build_that_fails_leaves_nothing_behind(settings, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("train.data.build.write_report", full_disk)
    with pytest.raises(OSError, match="no space"):
        build_dataset(settings, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_tokenizer_is_used_and_enters_the_fingerprint(dataset, settings, tmp_path):
    folder, report = dataset
    reuse = dataclasses.replace(settings, vocab_size=None, tokenizer=str(folder / "tokenizer"))
    reused = build_dataset(reuse, tmp_path / "set")
    for side in ("train", "heldout"):
        np.testing.assert_array_equal(load_rows(tmp_path / "set" / side).tokens, load_rows(folder / side).tokens)
    assert reused.fingerprint != report.fingerprint
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["alpha_1"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = dataclasses.replace(reuse, tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match="built with tokenizer="):
        build_dataset(other, tmp_path / "set")


def test_the_tokenizer_never_sees_the_heldout_side(settings, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=40, chats=0)
    mine = dataclasses.replace(settings, roots=(str(corpus),))
    build_dataset(mine, tmp_path / "before")
    heldout = {document.name for document in read_corpus(mine).heldout}
    for name in heldout:
        (corpus / name).unlink()
    # New held-out text, found by its hash; no train document changes.
    number, added = 0, 0
    while added < 3:
        path = corpus / f"new_{number}.py"
        path.write_text("zebra zebra zebra " * 200 + str(number))
        if path.name in {document.name for document in read_corpus_or_none(mine)}:
            added += 1
        else:
            path.unlink()
        number += 1
    build_dataset(mine, tmp_path / "after")
    before, after = (contents(tmp_path / name) for name in ("before", "after"))
    assert before["tokenizer/tokenizer.json"] == after["tokenizer/tokenizer.json"]
    assert before["train/tokens.npy"] == after["train/tokens.npy"]
    assert before["heldout/tokens.npy"] != after["heldout/tokens.npy"]


def read_corpus_or_none(settings: DatasetSettings):
    try:
        return read_corpus(settings).heldout
    except ValueError:  # no held-out document yet
        return ()


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({}, "exactly one of vocab_size"),
        ({"vocab_size": 300, "tokenizer": "x"}, "exactly one of vocab_size"),
        ({"vocab_size": 100}, "at least 260"),
        ({"vocab_size": 300, "max_seq_len": 1}, "at least 2"),
        ({"vocab_size": 300, "heldout_fraction": 0.0}, r"must lie in \(0, 0.5\]"),
        ({"vocab_size": 300, "max_file_bytes": 0}, "must be positive"),
        ({"vocab_size": 300, "seed": -1}, r"must lie in \[0, 2\*\*32\)"),
    ],
)
def test_impossible_settings_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        DatasetSettings(**changes)


def test_a_folder_of_another_format_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version=99, this program reads 1"):
        read_report(tmp_path)
    (tmp_path / "meta.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match=r"(?s)is damaged: .*fingerprint"):
        read_report(tmp_path)


def test_folders_from_before_too_long_was_a_setting_are_still_found_built(dataset, settings, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(dataset[0], folder)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["settings"]["too_long"]
    for side in ("train", "heldout"):
        del meta[side]["tokens_read"], meta[side]["tokens_lost"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert build_dataset(settings, folder).was_reused
    with pytest.raises(ValueError, match=r"built with too_long='cut' \(now 'drop'\)"):
        build_dataset(dataclasses.replace(settings, too_long="drop"), folder)


def test_the_fingerprint_of_settings_from_before_too_long_has_not_moved():
    expected = "2256a12d58fa948a0874b7191e0590833f2aba6626566138e27b399d6a521b49"
    assert fingerprint(DatasetSettings(vocab_size=300), "corpus", "tokenizer") == expected
    assert fingerprint(DatasetSettings(vocab_size=300, too_long="drop"), "corpus", "tokenizer") != expected
