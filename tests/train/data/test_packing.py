import numpy as np
import pytest

from train.data.encode import Chunk
from train.data.packing import load_rows, pack_chunks, save_rows


def random_chunks(count: int, max_seq_len: int) -> list[Chunk]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, max_seq_len + 1, count)
    return [
        Chunk(rng.integers(1, 1000, length).astype(np.int32), rng.integers(0, 2, length).astype(np.bool_))
        for length in lengths
    ]


def test_every_chunk_appears_once_and_whole():
    chunks = random_chunks(300, 32)
    rows = pack_chunks(chunks, max_seq_len=32, seed=0)
    found = []
    for row in range(rows.num_rows):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = np.flatnonzero(rows.segment_ids[row] == segment)
            assert (np.diff(here) == 1).all()
            assert rows.positions[row][here].tolist() == list(range(len(here)))
            found.append((rows.tokens[row][here].tolist(), rows.is_response[row][here].tolist()))
    assert sorted(found) == sorted((chunk.tokens.tolist(), chunk.is_response.tolist()) for chunk in chunks)


def test_padding_is_zero_in_every_array_and_small():
    rows = pack_chunks(random_chunks(300, 32), max_seq_len=32, seed=0)
    padding = rows.segment_ids == 0
    for array in (rows.tokens, rows.positions, rows.is_response):
        assert not array[padding].any()
    assert padding.mean() < 0.1
    assert rows.num_tokens == (~padding).sum()


def test_dtypes_are_the_smallest_that_fit():
    rows = pack_chunks(random_chunks(20, 32), max_seq_len=32, seed=0)
    dtypes = [array.dtype for array in (rows.tokens, rows.segment_ids, rows.positions, rows.is_response)]
    assert dtypes == [np.uint16, np.uint8, np.uint8, np.bool_]
    large = [Chunk(np.array([1, 70_000], np.int32), np.ones(2, np.bool_))]
    assert pack_chunks(large, max_seq_len=2, seed=0).tokens.tolist() == [[1, 70_000]]


def test_a_chunk_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="at most 9 tokens do not fit rows of max_seq_len=8"):
        pack_chunks([Chunk(np.ones(9, np.int32), np.ones(9, np.bool_))], max_seq_len=8, seed=0)


def test_saved_rows_come_back_mapped_from_disk(tmp_path):
    rows = pack_chunks(random_chunks(20, 32), max_seq_len=32, seed=0)
    save_rows(rows, tmp_path / "train")
    loaded = load_rows(tmp_path / "train")
    assert isinstance(loaded.tokens, np.memmap)
    for name in ("tokens", "segment_ids", "positions", "is_response"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(rows, name), strict=True)
