"""What is fed and what is scored: noising, the block grid, labels; all that needs no forward.

Owns the settings of the objective. Every document of length L runs as `[x_t | x_0]`: x_0 the clean tokens,
x_t the same with each response token replaced by MASK, both at positions 0..L-1. Row i is scored on token i+1.
"""

import dataclasses
import enum
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from train.batch import Batch


class LabelRows(enum.Enum):
    """Which noisy rows are scored, among those whose next token lies in the same document.

    MASK_ROWS: MASK rows whose next token is a response token: the rows that decoding drafts from.
    OFFICIAL: rows at response positions, so also an answer's last row, where the document goes on after it.
    AUTOMODEL: rows whose next token is a response token, so also the last prompt row, which is no MASK.

    Clean rows are scored alike under all three: where the next token is a response token.
    """

    MASK_ROWS = "mask_rows"
    OFFICIAL = "official"
    AUTOMODEL = "automodel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """How the two streams are laid out and weighed.

    Attributes:
        block_length: MASK positions per block, 1..15: the largest stride that will run, minus one.
        clean_weight: alpha in CE_noisy + alpha * CE_clean; not read under `auto_balance`.
        auto_balance: alpha = stop_gradient(CE_noisy / CE_clean) instead, CE_noisy as weighted by depth.
        label_rows: which noisy rows are scored.
        kl_weight: of KL(p || q), added to the cross-entropy of every scored MASK row.
        tv_weight: of the total variation between p and q, likewise: one minus the expected acceptance.
        depth_weights: factor on all noisy terms of the MASK rows at depth 0, 1, ...: `block_length` of them,
            or none for all ones.
    """

    block_length: int
    clean_weight: float = 0.2
    auto_balance: bool = False
    label_rows: LabelRows = LabelRows.MASK_ROWS
    kl_weight: float = 0.0
    tv_weight: float = 0.0
    depth_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.block_length <= 15:
            raise ValueError(f"{self.block_length=} must be in 1..15: strides go from 2 to 16")
        for name in ("clean_weight", "kl_weight", "tv_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        if not all(0 <= weight < math.inf for weight in self.depth_weights):
            raise ValueError(f"{self.depth_weights=} must be finite and not negative")
        if self.depth_weights and len(self.depth_weights) != self.block_length:
            raise ValueError(f"{self.depth_weights=} needs one weight per depth: {self.block_length=}")


class RowCounts(NamedTuple):
    """Scored rows per stream, float32: the denominators of the loss."""

    noisy: Float[Array, ""]
    clean: Float[Array, ""]


class Layout(NamedTuple):
    """All that can be read off a batch without a forward; every array [B, L].

    Attributes:
        tokens: x_0.
        positions: of the rows of either half.
        segment_ids: document of each row; 0 is padding.
        is_mask: the noisy row is fed MASK; decided by the token's role, never by its id: a prompt may hold
            the MASK id.
        block_start: position at which the row's block starts; 0 or less in the first block, which therefore
            has no clean context.
        depth: MASKs before this row in its own block, 0..b-1: the row of decoding's draft `depth + 1`. It is
            the position inside the block, except where prompt tokens or a shifted grid take the first places.
        labels: the next token; 0 where there is none.
        is_noisy_scored: the noisy row has a label that counts.
        is_clean_scored: the clean row has one.
    """

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    is_mask: Bool[Array, "B L"]
    block_start: Int[Array, "B L"]
    depth: Int[Array, "B L"]
    labels: Int[Array, "B L"]
    is_noisy_scored: Bool[Array, "B L"]
    is_clean_scored: Bool[Array, "B L"]

    @property
    def is_draft_scored(self) -> Bool[Array, "B L"]:
        """The scored rows that are fed MASK, whose distributions decoding drafts from."""
        return self.is_noisy_scored & self.is_mask

    def row_weights(self, depth_weights: tuple[float, ...]) -> Float[Array, "B L"]:
        """The factor on every noisy row's terms: its depth's, or 1 where a prompt token is fed."""
        by_depth = jnp.asarray(depth_weights, jnp.float32)[self.depth]
        return jnp.where(self.is_mask, by_depth, 1.0)

    def count_rows(self) -> RowCounts:
        noisy, clean = (jnp.sum(rows, dtype=jnp.float32) for rows in (self.is_noisy_scored, self.is_clean_scored))
        return RowCounts(noisy, clean)


def lay_out(batch: Batch, settings: ObjectiveSettings) -> Layout:
    """Noises a batch, cuts it into blocks and marks the scored rows.

    Position i of a document with grid offset o = phase % b lies in block k = (i + o) // b, which starts at
    k*b - o.

    Args:
        batch: packed documents; the tokens of one document are neighbours, in order.
        settings: `block_length` and `label_rows` are read.
    """
    tokens, segment_ids, positions, is_response, phase = (jnp.asarray(array) for array in batch)
    block_length = settings.block_length
    offset = phase % block_length
    block_start = (positions + offset) // block_length * block_length - offset

    depth = jnp.zeros(tokens.shape, jnp.int32)
    for distance in range(1, block_length):
        is_same_block = (_before(segment_ids, distance) == segment_ids) & (
            _before(block_start, distance) == block_start
        )
        depth += (is_same_block & _before(is_response, distance)).astype(jnp.int32)

    has_next = (segment_ids != 0) & (next_row(segment_ids) == segment_ids)
    predicts_response = has_next & next_row(is_response)
    match settings.label_rows:
        case LabelRows.MASK_ROWS:
            is_noisy_scored = is_response & predicts_response
        case LabelRows.OFFICIAL:
            is_noisy_scored = is_response & has_next
        case LabelRows.AUTOMODEL:
            is_noisy_scored = predicts_response
    return Layout(
        tokens=tokens,
        positions=positions,
        segment_ids=segment_ids,
        is_mask=is_response,
        block_start=block_start,
        depth=depth,
        labels=next_row(tokens),
        is_noisy_scored=is_noisy_scored,
        is_clean_scored=predicts_response,
    )


def next_row(array: Array) -> Array:
    """Every row's right neighbour; 0 or False past the end."""
    return jnp.pad(array[:, 1:], ((0, 0), (0, 1)))


def _before(array: Array, distance: int) -> Array:
    """The row `distance` places to the left; 0 or False past the start."""
    return jnp.pad(array, ((0, 0), (distance, 0)))[:, : array.shape[1]]
