import itertools

import numpy as np
import pytest

from train.batch import Batch
from train.data import check_vocabulary, heldout_batches, make_train_iterator
from train.data.packing import load_rows
from train.data.pipeline import PHASE_RANGE


def take(iterator, count: int) -> list[Batch]:
    return list(itertools.islice(iterator, count))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name, array in one._asdict().items():
            np.testing.assert_array_equal(array, getattr(other, name), err_msg=name, strict=True)


def row_keys(batches: list[Batch]) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch.tokens]


def train_rows(folder) -> list[bytes]:
    return [row.astype(np.int32).tobytes() for row in load_rows(folder / "train").tokens]


def iterator(folder, **changes):
    return make_train_iterator(folder, **{"batch_size": 4, "seed": 7, "random_block_phase": True, **changes})


def test_batches_have_the_promised_types_and_invariants(dataset):
    folder, _ = dataset
    for batch in take(iterator(folder), 10):
        assert isinstance(batch, Batch)
        dtypes = {name: array.dtype for name, array in batch._asdict().items()}
        assert dtypes.pop("is_response") == np.bool_
        assert set(dtypes.values()) == {np.dtype(np.int32)}
        assert all(array.shape == (4, 64) for array in batch)
        padding = batch.segment_ids == 0
        assert not any(array[padding].any() for array in batch)


@pytest.mark.parametrize("step", [0, 1, 13, 50])
def test_resuming_continues_bit_identically(dataset, step):
    folder, _ = dataset
    uninterrupted = iterator(folder)
    take(uninterrupted, step)
    assert_same(take(iterator(folder, first_batch=step), 8), take(uninterrupted, 8))


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(dataset):
    folder, report = dataset
    keys = row_keys(take(iterator(folder, batch_size=1), 3 * report.train.rows))
    epochs = [keys[k * report.train.rows : (k + 1) * report.train.rows] for k in range(3)]
    assert all(sorted(epoch) == sorted(train_rows(folder)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_span_epochs_and_drop_no_row(dataset):
    folder, report = dataset
    size = report.train.rows - 1
    one_by_one = row_keys(take(iterator(folder, batch_size=1), 3 * size))
    assert row_keys(take(iterator(folder, batch_size=size), 3)) == one_by_one


def test_seeds_give_orders_of_their_own_that_do_not_overlap(dataset):
    folder, report = dataset
    rows = report.train.rows
    keys = {seed: row_keys(take(iterator(folder, batch_size=1, seed=seed), 2 * rows)) for seed in (0, 1)}
    assert keys[0] == row_keys(take(iterator(folder, batch_size=1, seed=0), 2 * rows))
    assert keys[0][:rows] != keys[1][:rows]
    # Grain's shuffle(seed) uses seed + epoch: the second epoch of seed 0 would be the first of seed 1.
    assert keys[0][rows:] != keys[1][:rows]


def test_phases_are_constant_within_a_document_and_differ_between_documents_and_epochs(dataset):
    folder, report = dataset
    phases: dict[bytes, list[int]] = {}
    for batch in take(iterator(folder, batch_size=1), 2 * report.train.rows):
        for segment in range(1, batch.segment_ids.max() + 1):
            here = batch.segment_ids == segment
            (phase,) = np.unique(batch.block_phase[here])
            assert 0 <= phase < PHASE_RANGE
            phases.setdefault(batch.tokens[here].tobytes(), []).append(int(phase))
    pairs = [pair for pair in phases.values() if len(pair) == 2]
    assert len(pairs) > 30 and all(first != second for first, second in pairs)
    flat = np.array([phase for found in phases.values() for phase in found])
    # Some 200 draws modulo 3: each remainder is expected a third of the time, sigma 0.035; five sigmas.
    shares = np.bincount(flat % 3, minlength=3) / flat.size
    assert np.abs(shares - 1 / 3).max() < 5 * np.sqrt(2 / 9 / flat.size)


def test_switching_phases_off_leaves_zeros_and_the_same_rows(dataset):
    folder, _ = dataset
    on, off = take(iterator(folder), 10), take(iterator(folder, random_block_phase=False), 10)
    assert row_keys(on) == row_keys(off)
    assert not any(batch.block_phase.any() for batch in off)
    assert any(batch.block_phase.any() for batch in on)


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1], [0, 3]], ids=str)
def test_some_rows_of_a_batch_are_those_rows_of_the_whole_one(dataset, rows):
    folder, _ = dataset

    def chosen(batches):
        return [Batch(*(array[rows] for array in batch)) for batch in batches]

    some, whole = iterator(folder, rows=rows, first_batch=3), iterator(folder, first_batch=3)
    assert_same(take(some, 30), chosen(take(whole, 30)))
    assert_same(list(heldout_batches(folder, 4, rows=rows)), chosen(heldout_batches(folder, 4)))


def test_heldout_batches_cover_the_side_once_in_one_shape(dataset):
    folder, report = dataset
    batches = list(heldout_batches(folder, 3))
    assert len(batches) == -(-report.heldout.rows // 3)
    assert {batch.tokens.shape for batch in batches} == {(3, 64)}
    assert sum(int((batch.segment_ids > 0).sum()) for batch in batches) == report.heldout.tokens
    joined = np.concatenate([batch.tokens for batch in batches])[: report.heldout.rows]
    np.testing.assert_array_equal(joined, load_rows(folder / "heldout").tokens.astype(np.int32))
    assert_same(batches, list(heldout_batches(folder, 3)))
    assert not any(batch.block_phase.any() for batch in batches)


def test_the_last_heldout_batch_is_filled_with_padding(dataset):
    folder, report = dataset
    (batch,) = heldout_batches(folder, report.heldout.rows + 2)
    assert batch.segment_ids[:-2].any(axis=1).all()
    assert not any(array[-2:].any() for array in batch)


def test_limit_counts_heldout_batches(dataset):
    folder, _ = dataset
    assert_same(list(heldout_batches(folder, 2, limit=2)), list(heldout_batches(folder, 2))[:2])


def test_a_vocabulary_smaller_than_the_data_is_refused_with_both_numbers(dataset):
    folder, report = dataset
    check_vocabulary(folder, report.max_token_id + 1)
    size = report.max_token_id
    message = rf"ids up to {size}, .*ends at {size - 1} \(vocab_size={size}\)"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(folder, report.max_token_id)
    with pytest.raises(ValueError, match=message):
        iterator(folder, vocab_size=report.max_token_id)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"first_batch": -1}, "first_batch=-1 must not be negative"),
        ({"rows": [3, 4]}, r"rows=\[3, 4\] must name rows of a batch of batch_size=4"),
        ({"rows": []}, r"rows=\[\] must name rows"),
        ({"seed": -1}, "seed=-1 must lie in"),
    ],
)
def test_impossible_iterators_are_refused(dataset, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        iterator(dataset[0], **changes)


def test_a_folder_without_a_dataset_is_refused_at_the_call(tmp_path):
    with pytest.raises(ValueError, match="is no dataset folder"):
        iterator(tmp_path)
    with pytest.raises(ValueError, match="is no dataset folder"):
        heldout_batches(tmp_path, 2)
