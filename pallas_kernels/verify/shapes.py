"""Vocabularies and batches as decoding verifies them, and tiny odd ones: for tests and benchmarks alike."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One verification: [B, C = M + 1, V] anchors; B is `requests`, M is `num_masks`, V is `vocab_size`."""

    requests: int
    num_masks: int
    vocab_size: int
    dtype: str = "float32"


QWEN3_VOCAB = 151_936  # 2^7 * 1187; the same from 0.6B to 32B

SHAPES: dict[str, Shape] = {
    "qwen3_ar_b1": Shape(requests=1, num_masks=0, vocab_size=QWEN3_VOCAB),
    "qwen3_stride4_b1": Shape(requests=1, num_masks=3, vocab_size=QWEN3_VOCAB),
    "qwen3_stride8_b64": Shape(requests=64, num_masks=7, vocab_size=QWEN3_VOCAB),
    "tiny_model_b5": Shape(requests=5, num_masks=2, vocab_size=4096),
}
# Smaller than a tile, ragged, and several tiles with a ragged end; for the interpreters.
TINY: dict[str, Shape] = {
    "tiny": Shape(requests=3, num_masks=1, vocab_size=37),
    "tiny_tiles": Shape(requests=12, num_masks=2, vocab_size=384),
    "tiny_ragged": Shape(requests=8, num_masks=3, vocab_size=1000),
}
