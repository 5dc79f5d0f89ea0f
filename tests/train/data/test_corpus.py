import dataclasses
import json
from pathlib import Path

import pytest

from tests.train.data.conftest import write_corpus
from train.data import DatasetSettings
from train.data.corpus import Conversation, TextFile, read_corpus


def names(documents) -> list[str]:
    return [document.name for document in documents]


def both_sides(settings: DatasetSettings) -> list:
    corpus = read_corpus(settings)
    return [*corpus.train, *corpus.heldout]


def settings_for(root: Path, **changes) -> DatasetSettings:
    return DatasetSettings(roots=(str(root),), vocab_size=300, **{"heldout_fraction": 0.3, **changes})


def test_order_is_by_relative_path_and_not_by_directory_order(tmp_path):
    write_corpus(tmp_path, files=12, chats=0)
    train = names(read_corpus(settings_for(tmp_path)).train)
    assert train == sorted(train) and len(train) > 3


def test_documents_added_later_move_no_document_to_the_other_side(tmp_path):
    write_corpus(tmp_path, files=15, chats=10)
    before = read_corpus(settings_for(tmp_path))
    write_corpus(tmp_path, files=60, chats=10)
    after = read_corpus(settings_for(tmp_path))
    assert set(names(before.train)) < set(names(after.train))
    assert set(names(before.heldout)) < set(names(after.heldout))


def test_heldout_share_is_close_to_the_fraction(tmp_path):
    write_corpus(tmp_path, files=400, chats=0)
    corpus = read_corpus(settings_for(tmp_path, heldout_fraction=0.25))
    # Six sigmas of 400 draws (0.022 each): the hash of a fixed text is no accident, a wrong rule is seen.
    assert abs(len(corpus.heldout) / 400 - 0.25) < 0.13


def test_copies_of_a_file_are_dropped_whatever_their_name_and_line_ends(tmp_path):
    write_corpus(tmp_path, files=20, chats=0)
    original = read_corpus(settings_for(tmp_path))
    for path in list(tmp_path.rglob("*.py")):
        path.with_name("copy_" + path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    copied = read_corpus(settings_for(tmp_path))
    assert copied.skipped == {"duplicate": 20}
    assert (len(copied.train), len(copied.heldout)) == (len(original.train), len(original.heldout))


def test_what_cannot_be_read_is_skipped_and_counted(tmp_path):
    write_corpus(tmp_path, files=20, chats=0)
    (tmp_path / "latin.py").write_bytes("# caf\xe9".encode("latin-1"))
    (tmp_path / "large.txt").write_text("x" * 5001)
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    corpus = read_corpus(settings_for(tmp_path, max_file_bytes=5000))
    assert corpus.skipped == {"empty": 1, "not UTF-8": 1, "too large": 1}
    assert len(corpus.train) + len(corpus.heldout) == 20


def test_test_folders_are_a_choice_and_site_packages_are_not(tmp_path):
    write_corpus(tmp_path, files=20, chats=0)
    for folder in ("test", "site-packages", ".git"):
        (tmp_path / "package_0" / folder).mkdir()
        (tmp_path / "package_0" / folder / "found.py").write_text(f"folder = {folder!r}\n")
    without = names(both_sides(settings_for(tmp_path)))
    included = names(both_sides(settings_for(tmp_path, excluded_folders=())))
    assert set(included) - set(without) == {"package_0/test/found.py"}


def test_no_roots_reads_the_standard_library_without_installed_packages():
    found = names(both_sides(DatasetSettings(vocab_size=300, max_file_bytes=20_000)))
    assert "abc.py" in found and "json/decoder.py" in found
    assert not [name for name in found if "site-packages" in name or name.startswith("test/")]


def test_every_line_of_a_chat_file_is_its_own_document(tmp_path):
    write_corpus(tmp_path, files=5, chats=25)
    documents = both_sides(settings_for(tmp_path))
    assert sum(isinstance(document, Conversation) for document in documents) == 25
    assert sum(isinstance(document, TextFile) for document in documents) == 5


def test_a_json_string_with_a_line_separator_stays_one_conversation(tmp_path):
    write_corpus(tmp_path, files=20, chats=0)
    line = json.dumps(
        {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]},
        ensure_ascii=False,
    )
    (tmp_path / "chat.jsonl").write_text(line, encoding="utf-8")
    chats = [document for document in both_sides(settings_for(tmp_path)) if isinstance(document, Conversation)]
    assert [chat.messages[0]["content"] for chat in chats] == ["a\u2028b"]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{not json", "Expecting property name"),
        ('["messages"]', "no list of messages"),
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"role": "user", "content": null}]}', "no text role or content"),
    ],
)
def test_a_malformed_chat_line_is_named(tmp_path, line, complaint):
    (tmp_path / "chat.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"chat\.jsonl:2: .*{complaint}.*expected"):
        read_corpus(settings_for(tmp_path))


def test_missing_roots_and_empty_sides_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_corpus(settings_for(tmp_path / "nowhere"))
    (tmp_path / "one.py").write_text("one = 1\n")
    with pytest.raises(ValueError, match="each side needs one"):
        read_corpus(settings_for(tmp_path))


def test_a_file_that_was_asked_for_by_name_is_not_skipped(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"root .*latin\.txt is not UTF-8: .* at byte 3"):
        read_corpus(settings_for(tmp_path / "latin.txt"))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"table\.csv ends in '\.csv'; allowed: .*\.jsonl and \.arrayrecord"):
        read_corpus(settings_for(tmp_path / "table.csv"))


def test_the_corpus_hash_sees_every_edit(tmp_path):
    write_corpus(tmp_path, files=20, chats=5)
    settings = settings_for(tmp_path)
    before = read_corpus(settings).sha256
    assert read_corpus(dataclasses.replace(settings)).sha256 == before
    path = tmp_path / "package_1" / "module_7.py"
    path.write_text(path.read_text() + "#")
    assert read_corpus(settings).sha256 != before
