"""Dataset folder -> batches. The order is a function of (seed, index): an iterator's state is one integer."""

from collections.abc import Iterator
from pathlib import Path

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
    num_shards: int = 1,
    shard_index: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled batches; every epoch has its own order, and a batch may span two epochs.

    `get_state` and `set_state` resume bit-identically. The random phase of a document depends on the seed and
    on how many rows came before it, so it changes from epoch to epoch and survives a resume.

    Args:
        dataset_dir: as `build_dataset` wrote it.
        batch_size: rows of the global batch, B.
        seed: of the order and of the phases; seeds do not overlap.
        random_block_phase: draw one phase per document; else all are zero.
        vocab_size: rows of the model's embedding; checked against the data.
        num_shards: hosts that read this dataset; each gets `batch_size / num_shards` rows, together the
            global batch. The state does not depend on it.
        shard_index: this host.

    Returns:
        Iterator of `Batch`, arrays [batch_size / num_shards, L].

    Raises:
        ValueError: no dataset; a size out of range; ids that the model lacks.
    """
    if batch_size < 1 or num_shards < 1 or batch_size % num_shards:
        raise ValueError(f"{batch_size=} must be a positive multiple of {num_shards=}")
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"{shard_index=} must lie in [0, {num_shards})")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} must lie in [0, 2**32), the range of Grain's shuffle")
    read_report(dataset_dir)
    if vocab_size is not None:
        check_vocabulary(dataset_dir, vocab_size)
    source = RowSource(load_rows(Path(dataset_dir) / "train"))
    # seed() hashes a seed for each step below; shuffle(seed) would use seed + epoch, and seed 1 would start
    # with the second epoch of seed 0.
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if random_block_phase:
        rows = rows.random_map(_draw_phases)
    rows = rows[shard_index::num_shards]
    # An endless dataset has no remainder; without the flag Grain rounds its length up, and overflows at 1.
    batches = rows.batch(batch_size // num_shards, drop_remainder=True).map(_to_batch)
    # Grain's default keeps 500 elements ready, here whole batches: a gigabyte at 32 x 4096 tokens.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def heldout_batches(dataset_dir: str | Path, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The held-out rows once, in file order, which packing has shuffled; phases are zero.

    All batches have one shape, so an evaluation compiles once: the last is filled up with rows of padding.

    Args:
        dataset_dir: as `build_dataset` wrote it.
        batch_size: rows in each batch, B.
        limit: most batches to yield; None for all.

    Returns:
        Iterator of `Batch`, arrays [B, L].

    Raises:
        ValueError: no dataset, or a size out of range.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"{batch_size=} and {limit=} must be positive")
    read_report(dataset_dir)
    source = RowSource(load_rows(Path(dataset_dir) / "heldout"))
    return _in_order(source, batch_size, limit)


def _in_order(source: RowSource, batch_size: int, limit: int | None) -> Iterator[Batch]:
    starts = range(0, len(source), batch_size)[:limit]
    for start in starts:
        rows = [source[index] for index in range(start, min(start + batch_size, len(source)))]
        padding = {name: np.zeros_like(array) for name, array in rows[0].items()}
        rows += [padding] * (batch_size - len(rows))
        yield _to_batch({name: np.stack([row[name] for row in rows]) for name in padding})


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


def _to_batch(arrays: dict[str, Shaped[np.ndarray, "B L"]]) -> Batch:
    return Batch(**arrays)
