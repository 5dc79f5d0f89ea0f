"""Chunks -> rows of exactly `max_seq_len` tokens, and the files that hold them.

Packing happens once, offline: a training run then reads rows by index, so its place in the data is one
integer, and resuming is exact whatever the number of hosts. Chunks stay whole; Grain's best-fit packer places
them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Bool, Integer
from tqdm import tqdm

from train.data.encode import Chunk

# Rows open at a time. More rows leave less padding and cost more time per chunk.
OPEN_ROWS = 512


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows in the smallest dtypes that hold them; the meaning is that of `train.batch.Batch`.

    Attributes:
        tokens: ids; 0 in padding.
        segment_ids: 1, 2, ... per chunk within the row; 0 in padding.
        positions: restart with each chunk.
        is_response: False in padding.
    """

    tokens: Integer[np.ndarray, "rows L"]
    segment_ids: Integer[np.ndarray, "rows L"]
    positions: Integer[np.ndarray, "rows L"]
    is_response: Bool[np.ndarray, "rows L"]

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        return int(np.count_nonzero(self.segment_ids))


def pack_chunks(
    chunks: Sequence[Chunk], *, max_seq_len: int, seed: int, show_progress: bool = False, title: str = "pack"
) -> PackedRows:
    """Packs shuffled chunks, so that any run of rows is a fair sample of the corpus.

    Args:
        chunks: each of at most `max_seq_len` tokens.
        max_seq_len: row length L.
        seed: of the shuffle.
        show_progress: draw a bar.
        title: its label.

    Raises:
        ValueError: no chunk, or one longer than a row.
    """
    longest = max((len(chunk.tokens) for chunk in chunks), default=0)
    if not 0 < longest <= max_seq_len:
        raise ValueError(f"{len(chunks)} chunks of at most {longest} tokens do not fit rows of {max_seq_len=}")
    elements = [{"tokens": chunk.tokens, "is_response": chunk.is_response} for chunk in chunks]
    shuffled = grain.MapDataset.source(elements).seed(seed).shuffle()
    packed = grain.experimental.BestFitPackIterDataset(
        # No read threads: elements lie in memory.
        shuffled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": max_seq_len, "is_response": max_seq_len},
        num_packing_bins=OPEN_ROWS,
        shuffle_bins=False,
    )
    rows = list(tqdm(packed, desc=title, unit="row", disable=not show_progress))

    def stack(name: str) -> np.ndarray:
        stacked = np.stack([row[name] for row in rows])
        return stacked.astype(np.min_scalar_type(stacked.max()))

    return PackedRows(
        tokens=stack("tokens"),
        segment_ids=stack("tokens_segment_ids"),
        positions=stack("tokens_positions"),
        is_response=np.stack([row["is_response"] for row in rows]),
    )


def save_rows(rows: PackedRows, folder: Path) -> None:
    """Writes one `.npy` per array into the new folder `folder`."""
    folder.mkdir(parents=True)
    for field in dataclasses.fields(rows):
        np.save(folder / f"{field.name}.npy", getattr(rows, field.name))


def load_rows(folder: Path) -> PackedRows:
    """Maps the arrays into memory, read-only; nothing is read until it is used."""
    names = (field.name for field in dataclasses.fields(PackedRows))
    return PackedRows(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})
