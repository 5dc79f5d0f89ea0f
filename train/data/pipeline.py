"""Dataset folder -> batches. A batch is a function of (seed, its number), so the step of a run is its position."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Shaped

from train.batch import Batch
from train.data.packing import PackedRows, load_rows
from train.data.settings import read_report

# lcm(1..16): `phase % block_length` is exactly uniform for every block length up to 16.
PHASE_RANGE = 720_720

Row = dict[str, Shaped[np.ndarray, " L"]]


class RowSource:
    """Rows by index, in the dtypes of `Batch`, with a zero `block_phase`. A Grain random-access source."""

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows.num_rows

    def __getitem__(self, index: int) -> Row:
        rows = self._rows
        tokens = rows.tokens[index].astype(np.int32)
        return {
            "tokens": tokens,
            "segment_ids": rows.segment_ids[index].astype(np.int32),
            "positions": rows.positions[index].astype(np.int32),
            "is_response": np.array(rows.is_response[index]),
            "block_phase": np.zeros_like(tokens),
        }


def make_train_iterator(
    dataset_dir: str | Path,
    *,
    batch_size: int,
    seed: int,
    random_block_phase: bool,
    vocab_size: int | None = None,
    first_batch: int = 0,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled batches; every epoch has its own order, and a batch may span two epochs.

    A batch is a function of its number: a run that has taken k of them goes on, bit for bit, with `first_batch=k`,
    in however many processes it now runs. The random phase of a document depends on the seed and on how many rows
    came before it, so it changes from epoch to epoch.

    Args:
        dataset_dir: as `build_dataset` wrote it.
        batch_size: rows of the global batch, B.
        seed: of the order and of the phases; seeds do not overlap.
        random_block_phase: draw one phase per document; else all are zero.
        vocab_size: rows of the model's embedding; checked against the data.
        first_batch: number of the first batch to hand out.
        rows: which rows of each global batch to read, R of them; None for all.

    Returns:
        Iterator of `Batch`, arrays [R, L].

    Raises:
        ValueError: no dataset; a size out of range; ids that the model lacks.
    """
    if batch_size < 1 or first_batch < 0:
        raise ValueError(f"{batch_size=} must be positive, {first_batch=} must not be negative")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} must lie in [0, 2**32), the range of Grain's shuffle")
    rows = _checked_rows(rows, batch_size)
    read_report(dataset_dir)
    if vocab_size is not None:
        check_vocabulary(dataset_dir, vocab_size)
    source = RowSource(load_rows(Path(dataset_dir) / "train"))
    # seed() hashes a seed for each step below; shuffle(seed) would use seed + epoch, and seed 1 would start
    # with the second epoch of seed 0.
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if random_block_phase:
        stream = stream.random_map(_draw_phases)

    def read(number: int) -> Batch:
        # Any: Grain's hint allows for rows that a filter dropped, and here is none.
        taken: list[Any] = [stream[number * batch_size + row] for row in rows]
        return _to_batch(taken)

    # Grain's own batch() would read every row, and its slices hand each process rows from all over the batch.
    batches = grain.MapDataset.range(first_batch, sys.maxsize // batch_size).map(read)
    # Grain's default keeps 500 elements ready, here whole batches: a gigabyte at 32 x 4096 tokens.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def heldout_batches(
    dataset_dir: str | Path, batch_size: int, limit: int | None = None, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """The held-out rows once, in file order, which packing has shuffled; phases are zero.

    All batches have one shape, so an evaluation compiles once: the last is filled up with rows of padding.

    Args:
        dataset_dir: as `build_dataset` wrote it.
        batch_size: rows in each global batch, B.
        limit: most batches to yield; None for all.
        rows: which rows of each global batch to read, R of them; None for all.

    Returns:
        Iterator of `Batch`, arrays [R, L].

    Raises:
        ValueError: no dataset, or a size out of range.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"{batch_size=} and {limit=} must be positive")
    rows = _checked_rows(rows, batch_size)
    read_report(dataset_dir)
    source = RowSource(load_rows(Path(dataset_dir) / "heldout"))
    starts = range(0, len(source), batch_size)[:limit]
    return (_to_batch([_row_or_padding(source, start + row) for row in rows]) for start in starts)


def _row_or_padding(source: RowSource, index: int) -> Row:
    if index < len(source):
        return source[index]
    return {name: np.zeros_like(array) for name, array in source[0].items()}


def _checked_rows(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    if rows is None:
        return range(batch_size)
    if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ValueError(f"{rows=} must name rows of a batch of {batch_size=}")
    return rows


def heldout_prompts(dataset_dir: str | Path, num_prompts: int, prompt_tokens: int) -> list[list[int]]:
    """The first tokens of held-out rows, spread evenly over them: the same ones at every call.

    Raises:
        ValueError: no dataset.
    """
    rows = [row for batch in heldout_batches(dataset_dir, 1) for row in batch.tokens.tolist()]
    step = max(1, len(rows) // num_prompts)
    return [row[:prompt_tokens] for row in rows[::step][:num_prompts]]


def check_vocabulary(dataset_dir: str | Path, vocab_size: int) -> None:
    """Checks that a model of `vocab_size` embedding rows knows every id of the dataset.

    Raises:
        ValueError: it does not; under jit the lookup would clamp the id and train on the wrong token.
    """
    max_token_id = read_report(dataset_dir).max_token_id
    if max_token_id >= vocab_size:
        raise ValueError(
            f"{dataset_dir} holds token ids up to {max_token_id}, the model's vocabulary ends at "
            f"{vocab_size - 1} ({vocab_size=}): build the dataset with the model's own tokenizer"
        )


def _draw_phases(row: Row, rng: np.random.Generator) -> Row:
    segment_ids = row["segment_ids"]
    phases: Int[np.ndarray, " segments"] = rng.integers(0, PHASE_RANGE, segment_ids.max() + 1, np.int32)
    phases[0] = 0  # padding
    return row | {"block_phase": phases[segment_ids]}


def _to_batch(rows: Sequence[Row]) -> Batch:
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
