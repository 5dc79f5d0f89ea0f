"""Projections of Qwen3-8B with the adapter of the paper (rank 128), and tiny odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """`rows` = M, `width` = D, `columns` = F; every second row is gated in the benchmark, as in training."""

    rows: int
    width: int
    columns: int
    rank: int


SHAPES: dict[str, Shape] = {
    "8b_qkv_decode": Shape(rows=8, width=4096, columns=6144, rank=128),
    "8b_down_decode": Shape(rows=64, width=12_288, columns=4096, rank=128),
    "8b_gate_up_train": Shape(rows=8192, width=4096, columns=24_576, rank=128),
    "tiny": Shape(rows=5, width=12, columns=9, rank=3),
    "tiny_rank_one": Shape(rows=1, width=7, columns=31, rank=1),
}
