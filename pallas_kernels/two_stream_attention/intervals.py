"""What every row sees, as half-open intervals of row numbers, and which tiles that leaves to visit.

Kernels need no mask array: rows of a document are neighbours, so a row sees at most two intervals of keys.
A noisy row sees as many keys as the clean row beside it: its block merely moves from one stream to the other.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Intervals(NamedTuple):
    """Of every row, int32 [B, L]. Padding begins past the last row and ends at 0: every interval is empty.

    Clean row i sees the clean rows [document_first[i], i + 1). Noisy row i sees the clean rows
    [document_first[i], block_first[i]) and the noisy rows [block_first[i], i + 1).
    """

    document_first: Int[Array, "B L"]
    document_end: Int[Array, "B L"]
    block_first: Int[Array, "B L"]
    block_end: Int[Array, "B L"]


class Sight(enum.Enum):
    """Which stream's queries look at which stream's keys."""

    CLEAN_TO_CLEAN = enum.auto()
    NOISY_TO_CLEAN = enum.auto()
    NOISY_TO_NOISY = enum.auto()

    def interval(
        self, document_first: Int[Array, "X Y"], block_first: Int[Array, "X Y"], row: Int[Array, "X Y"]
    ) -> tuple[Int[Array, "X Y"], Int[Array, "X Y"]]:
        """First key that each row sees and the one after the last, of a tile of rows."""
        match self:
            case Sight.CLEAN_TO_CLEAN:
                return document_first, row + 1
            case Sight.NOISY_TO_CLEAN:
                return document_first, block_first
            case Sight.NOISY_TO_NOISY:
                return block_first, row + 1


class TileRange(NamedTuple):
    """Tiles that one tile of the other axis has to visit: [lower, upper).

    Those in [full_lower, full_upper) are visible as a whole, from both streams to the clean one, and need no
    mask. Noisy keys are met in [band_lower, band_upper) only.
    """

    lower: Any
    full_lower: Any
    full_upper: Any
    upper: Any
    band_lower: Any
    band_upper: Any


NUM_BOUNDS = len(TileRange._fields)


def find_intervals(
    segment_ids: Int[Array, "B L"], positions: Int[Array, "B L"], block_start: Int[Array, "B L"]
) -> Intervals:
    """Row-number intervals; the package states what the three arrays hold."""
    length = segment_ids.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    document_first, document_end = _extents(segment_ids)
    rows_into_block = (positions - block_start).astype(jnp.int32)
    # The first block may start before its document, where the document's grid is shifted.
    block_first = jnp.maximum(row - rows_into_block, document_first)
    _, block_end = _extents(block_first)
    is_padding = segment_ids == 0
    return Intervals(
        document_first=jnp.where(is_padding, length, document_first),
        document_end=jnp.where(is_padding, 0, document_end),
        block_first=jnp.where(is_padding, length, block_first),
        block_end=jnp.where(is_padding, 0, jnp.minimum(block_end, document_end)),
    )


def ranges_of_row_tiles(intervals: Intervals, *, rows: int, keys: int) -> Int[Array, "B tiles bounds"]:
    """Tiles of `keys` keys for every tile of `rows` queries; both divide L. The last axis is a `TileRange`."""
    low = _by_tile(intervals.document_first, rows)
    block = _by_tile(intervals.block_first, rows)
    row = jax.lax.broadcasted_iota(jnp.int32, intervals.document_first.shape, 1)
    lower = low.min(2) // keys
    upper = jnp.maximum(-(-_by_tile(jnp.where(intervals.document_end > 0, row + 1, 0), rows).max(2) // keys), lower)
    full_lower = jnp.clip(-(-low.max(2) // keys), lower, upper)
    full_upper = jnp.clip(block.min(2) // keys, full_lower, upper)
    band_lower = jnp.clip(block.min(2) // keys, lower, upper)
    return jnp.stack(TileRange(lower, full_lower, full_upper, upper, band_lower, upper), axis=-1)


def ranges_of_key_tiles(intervals: Intervals, *, rows: int, keys: int) -> Int[Array, "B tiles bounds"]:
    """Tiles of `rows` queries for every tile of `keys` keys; both divide L. The last axis is a `TileRange`."""
    length = intervals.document_first.shape[1]
    end = _by_tile(intervals.document_end, keys)
    row = jax.lax.broadcasted_iota(jnp.int32, intervals.document_first.shape, 1)
    lower = _by_tile(jnp.where(intervals.document_end > 0, row, length), keys).min(2) // rows
    upper = jnp.maximum(-(-end.max(2) // rows), lower)
    full_lower = jnp.clip(-(-_by_tile(intervals.block_end, keys).max(2) // rows), lower, upper)
    full_upper = jnp.clip(end.min(2) // rows, full_lower, upper)
    return jnp.stack(TileRange(lower, full_lower, full_upper, upper, lower, full_lower), axis=-1)


def _extents(labels: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """First row, and row after the last, of the run of equal labels that each row lies in."""
    length = labels.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, labels.shape, 1)
    is_change = labels[:, 1:] != labels[:, :-1]
    is_first = jnp.pad(is_change, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(is_change, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(is_first, row, 0), axis=1)
    end = jax.lax.cummin(jnp.where(is_last, row + 1, length), axis=1, reverse=True)
    return first, end


def _by_tile(values: Int[Array, "B L"], tile: int) -> Int[Array, "B tiles tile"]:
    return values.reshape(values.shape[0], -1, tile)
