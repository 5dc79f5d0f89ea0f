"""Named real workloads of the op: what the tests, the compile tests and the benchmark run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A packed training batch; every row of it holds the same documents.

    Attributes:
        batch: rows, B.
        length: tokens of a row, L.
        heads: query heads, N.
        kv_heads: key heads, K.
        head_dim: H.
        documents: lengths of the documents packed into a row; the rest of it is padding.
        block_length: rows of a noisy block.
        offset: by how much the second document of a row, the fourth and so on shift their block grid.
        dtype: of the streams.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: tuple[int, ...]
    block_length: int
    offset: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if sum(self.documents) > self.length or not 0 <= self.offset < self.block_length:
            raise ValueError(f"{self}: the documents or the offset do not fit")

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, over both streams and all rows of the batch, per head."""
        return self.batch * sum(length * (length + 1) for length in self.documents)

    @property
    def forward_flop(self) -> int:
        """Two matrix products over what is visible."""
        return 4 * self.heads * self.head_dim * self.visible_pairs

    @property
    def backward_flop(self) -> int:
        """Five matrix products; recomputing the forward under rematerialisation is not counted."""
        return 10 * self.heads * self.head_dim * self.visible_pairs

    def indices(self) -> dict[str, Int[Array, "B L"]]:
        """`segment_ids`, `positions` and `block_start`, as the training layout makes them."""
        columns = np.zeros((3, self.length), np.int32)
        first = 0
        for number, length in enumerate(self.documents):
            offset = self.offset * (number % 2)
            position = np.arange(length)
            block_start = (position + offset) // self.block_length * self.block_length - offset
            columns[:, first : first + length] = np.full(length, number + 1), position, block_start
            first += length
        of_batch = jnp.tile(columns[:, None], (1, self.batch, 1))
        return dict(zip(("segment_ids", "positions", "block_start"), of_batch, strict=True))


SHAPES: dict[str, Shape] = {
    "qwen3_0p6b_4k": Shape(batch=4, length=4096, heads=16, kv_heads=8, head_dim=128, documents=(4096,), block_length=3),
    "qwen3_8b_4k": Shape(batch=1, length=4096, heads=32, kv_heads=8, head_dim=128, documents=(4096,), block_length=3),
    # Chat data: many short documents, padding at the end, shifted grids.
    "qwen3_8b_4k_packed": Shape(
        batch=1,
        length=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        documents=(1203, 611, 290, 977, 64, 800),
        block_length=7,
        offset=2,
    ),
    "qwen3_8b_8k": Shape(batch=1, length=8192, heads=32, kv_heads=8, head_dim=128, documents=(8192,), block_length=7),
    "qwen3_32b_4k": Shape(batch=1, length=4096, heads=64, kv_heads=8, head_dim=128, documents=(4096,), block_length=15),
    # The model in assets/: head width 64.
    "tiny_qwen3_py": Shape(
        batch=32, length=256, heads=4, kv_heads=2, head_dim=64, documents=(140, 101), block_length=3, offset=1
    ),
    # Odd on purpose: a length that no tile divides, blocks of one row, a document of one row, three heads a key head.
    "odd_groups": Shape(
        batch=2, length=75, heads=6, kv_heads=2, head_dim=16, documents=(20, 1, 33, 15), block_length=1, dtype="float32"
    ),
    "odd_blocks": Shape(
        batch=1, length=53, heads=2, kv_heads=2, head_dim=16, documents=(37, 16), block_length=15, offset=4
    ),
}
