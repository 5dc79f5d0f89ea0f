import json
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tests.train.data.conftest import python_text, write_corpus
from train.data import DatasetSettings, build_dataset
from train.data.encode import encode_documents
from train.data.packing import load_rows
from train.data.records import TokenSequence, is_record_file, parse_record, read_records
from train.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([python_text(seed) for seed in range(20)], vocab_size=320)


def parse(record: object) -> TokenSequence:
    document = parse_record(json.dumps(record), name="a:1", where="a:1")
    assert isinstance(document, TokenSequence)
    return document


def write_array_record(path: Path, records: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_three_spellings_of_the_same_tokens_are_equal():
    spellings = [
        {"tokens": [5, 6, 7], "is_response": [False, True, True]},
        {"tokens": [5, 6, 7], "is_response": [0, 1, 1], "source": "ignored"},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
    ]
    for spelling in spellings:
        document = parse(spelling)
        assert document.tokens.tolist() == [5, 6, 7] and document.is_response.tolist() == [False, True, True]


@pytest.mark.parametrize("key", ["tokens", "input_ids"])
def test_tokens_without_a_mask_are_supervised_throughout(key):
    assert parse({key: [5, 6]}).is_response.tolist() == [True, True]


@pytest.mark.parametrize(
    "record, complaint",
    [
        ({"tokens": []}, "tokens must be a list, and not empty"),
        ({"tokens": "5 6"}, "tokens must be a list"),
        ({"tokens": [[5, 6]]}, "nested list; give one document a record"),
        ({"tokens": [5, 6.5]}, "whole numbers from 0 on"),
        ({"tokens": [5, -1]}, "whole numbers from 0 on"),
        ({"tokens": [5, 2**31]}, "whole numbers from 0 on"),
        ({"tokens": [5, 2**70]}, "whole numbers from 0 on"),
        ({"tokens": [True, False]}, "whole numbers from 0 on"),
        ({"tokens": [5, 6], "is_response": [True]}, "1 values of is_response for 2 tokens"),
        ({"tokens": [5, 6], "is_response": [0, 2]}, "true and false only"),
        ({"tokens": [5, 6], "is_response": ["no", "yes"]}, "true and false only"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "not shifted by one"),
        ({"input_ids": [5, 6], "labels": [5, None]}, "every label must be -100 or the id"),
        ({"input_ids": [5, 0], "attention_mask": [1, 0]}, "without padding"),
        ({"input_ids": [5], "tokens": [5]}, "holds tokens and input_ids; give one"),
        ({"text": "five"}, "no list of messages"),
    ],
    ids=str,
)
def test_a_record_that_contradicts_itself_is_named(record, complaint):
    with pytest.raises(ValueError, match=rf"a:1: .*{complaint}"):
        parse(record)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"tokens": [5]}\n\n{"tokens": [5], "note": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl:3: not UTF-8: .* at byte 28"):
        list(read_records(path, "chats.jsonl"))


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"tokens": [5]}\r\n{"tokens": [6]}')
    assert [document.name for document in read_records(path, "c")] == ["c:1", "c:2"]


def test_array_record_holds_the_lines_of_jsonl(tmp_path):
    lines = [json.dumps({"tokens": [number, 7]}) for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    write_array_record(tmp_path / "a.arrayrecord", [line.encode() for line in lines])
    from_lines = read_records(tmp_path / "a.jsonl", "a")
    from_array = read_records(tmp_path / "a.arrayrecord", "a")
    assert (
        [d.tokens.tolist() for d in from_array]
        == [d.tokens.tolist() for d in from_lines]
        == [[number, 7] for number in range(5)]
    )


def test_a_broken_array_record_and_a_broken_record_in_one_are_named(tmp_path):
    path = write_array_record(tmp_path / "a.arrayrecord", [b'{"tokens": [1]}', b'{"tokens": 1}'])
    with pytest.raises(ValueError, match=r"a\.arrayrecord:1: tokens must be a list"):
        list(read_records(path, "a"))
    (tmp_path / "b.arrayrecord").write_bytes(b"nonsense" * 100)
    with pytest.raises(ValueError, match=r"b\.arrayrecord: no readable ArrayRecord file"):
        list(read_records(tmp_path / "b.arrayrecord", "b"))


def test_array_record_files_are_known_by_every_usual_name():
    names = ["a.jsonl", "a.arrayrecord", "a.array_record", "a-train.array_record-00000-of-00004"]
    assert all(is_record_file(name) for name in names)
    assert not any(is_record_file(name) for name in ["a.json", "array_record", "a.array_record.md"])


def chunks_of(folder: Path) -> list[tuple[list[int], list[bool]]]:
    found = []
    for side in ("train", "heldout"):
        rows = load_rows(folder / side)
        for row in range(rows.num_rows):
            for segment in range(1, int(rows.segment_ids[row].max()) + 1):
                here = rows.segment_ids[row] == segment
                found.append((rows.tokens[row][here].tolist(), rows.is_response[row][here].tolist()))
    return sorted(found)


def test_tokens_made_elsewhere_pack_to_the_same_chunks_as_their_text(dataset, settings, tmp_path):
    folder, _ = dataset
    # Long enough for whole documents, so that the chunks of the first are the documents of the second.
    whole = DatasetSettings(
        roots=settings.roots, tokenizer=str(folder / "tokenizer"), max_seq_len=4096, heldout_fraction=0.2
    )
    build_dataset(whole, tmp_path / "whole")
    documents = chunks_of(tmp_path / "whole")
    lines = [json.dumps({"tokens": tokens, "is_response": flags}) for tokens, flags in documents]
    (tmp_path / "half.jsonl").write_text("\n".join(lines[::2]))
    write_array_record(tmp_path / "half.arrayrecord", [line.encode() for line in lines[1::2]])
    roots = (str(tmp_path / "half.jsonl"), str(tmp_path / "half.arrayrecord"))
    for max_seq_len in (4096, 64):
        for name, source in (("text", settings.roots), ("tokens", roots)):
            build_dataset(
                DatasetSettings(roots=source, tokenizer=whole.tokenizer, max_seq_len=max_seq_len, heldout_fraction=0.2),
                tmp_path / f"{name}_{max_seq_len}",
            )
        assert chunks_of(tmp_path / f"tokens_{max_seq_len}") == chunks_of(tmp_path / f"text_{max_seq_len}")
    assert len(documents) == 70


def test_ids_beyond_the_tokenizers_vocabulary_and_masks_are_refused(tokenizer):
    def encode(*tokens: int):
        return encode_documents([parse({"tokens": list(tokens)})], tokenizer, max_seq_len=8)

    assert len(encode(4, len(tokenizer) - 1).chunks) == 1
    with pytest.raises(ValueError, match=f"a:1: token id {len(tokenizer)} is outside .* vocabulary of"):
        encode(4, len(tokenizer))
    with pytest.raises(ValueError, match="holds the MASK id 3"):
        encode(4, 3)


def test_tokens_cannot_train_a_tokenizer(tmp_path):
    write_corpus(tmp_path, files=20, chats=0)
    (tmp_path / "more.jsonl").write_text('{"tokens": [1, 2]}\n')
    settings = DatasetSettings(roots=(str(tmp_path),), vocab_size=300, heldout_fraction=0.3)
    with pytest.raises(ValueError, match=r"more\.jsonl:1 is tokenized already: give the tokenizer"):
        build_dataset(settings, tmp_path / "set")
