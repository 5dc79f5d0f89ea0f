"""Training steps of Qwen3 as the distillation sees them, and tiny odd ones: for tests and benchmarks alike."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of the op.

    Attributes:
        rows: positions of one stream, R.
        width: D.
        vocab_size: V.
        kept: share of the rows that are MASKs with a label; the op drops the others.
        dtype: of hidden states and weight.
    """

    rows: int
    width: int
    vocab_size: int
    kept: float
    dtype: str = "bfloat16"


QWEN3_VOCAB = 151_936

SHAPES: dict[str, Shape] = {
    # One device's share of 4 packed sequences of 4,096; half of the tokens are the answer.
    "8b_16k": Shape(rows=16_384, width=4096, vocab_size=QWEN3_VOCAB, kept=0.5),
    "8b_4k": Shape(rows=4096, width=4096, vocab_size=QWEN3_VOCAB, kept=0.5),
    "0p6b_16k": Shape(rows=16_384, width=1024, vocab_size=QWEN3_VOCAB, kept=0.5),
    "tiny": Shape(rows=37, width=12, vocab_size=53, kept=0.6, dtype="float32"),
    "tiny_one_row": Shape(rows=1, width=7, vocab_size=3, kept=1.0, dtype="float32"),
}
