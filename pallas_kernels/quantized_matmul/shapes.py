"""Weights of Qwen3-8B as decoding multiplies by them, and tiny odd ones: for tests and benchmarks alike."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One product [M, D] x [D, F]; M is `rows`, D is `width`, F is `columns`."""

    rows: int
    width: int
    columns: int


# Qwen3-8B: D = 4096, 32 query and 8 key heads of 128, mlp of 12,288, 151,936 tokens.
QWEN3_8B = {
    "qkv": (4096, (32 + 2 * 8) * 128),
    "o": (32 * 128, 4096),
    "gate_up": (4096, 2 * 12_288),
    "down": (12_288, 4096),
    "head": (4096, 151_936),
}
# One token; a window of stride 4; one of the fixed decode width; eight of those.
ROWS = (1, 7, 8, 64)

SHAPES: dict[str, Shape] = {
    f"8b_{name}_m{rows}": Shape(rows=rows, width=width, columns=columns)
    for name, (width, columns) in QWEN3_8B.items()
    for rows in ROWS
}
TINY: dict[str, Shape] = {
    "tiny": Shape(rows=3, width=64, columns=48),
    "tiny_ragged": Shape(rows=19, width=77, columns=101),
    "tiny_one": Shape(rows=1, width=1, columns=1),
    "tiny_two_row_blocks": Shape(rows=70, width=33, columns=17),
}
SHAPES |= TINY
