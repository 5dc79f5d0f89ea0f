"""Training steps of Qwen3 as they reach the head, and tiny odd ones: for tests and benchmarks alike."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of the op.

    Attributes:
        rows: positions of both streams, R.
        width: D.
        vocab_size: V.
        labelled: share of the rows that have a label; the op drops the others.
        dtype: of hidden states and weight.
    """

    rows: int
    width: int
    vocab_size: int
    labelled: float
    dtype: str = "bfloat16"

    @property
    def num_labelled(self) -> int:
        return round(self.rows * self.labelled)


QWEN3_VOCAB = 151_936

SHAPES: dict[str, Shape] = {
    # One device's share of 8 packed sequences of 4,096; half of the tokens are the answer.
    "8b_32k": Shape(rows=32_768, width=4096, vocab_size=QWEN3_VOCAB, labelled=0.5),
    "8b_8k": Shape(rows=8192, width=4096, vocab_size=QWEN3_VOCAB, labelled=0.5),
    "8b_8k_all_labelled": Shape(rows=8192, width=4096, vocab_size=QWEN3_VOCAB, labelled=1.0),
    "0p6b_32k": Shape(rows=32_768, width=1024, vocab_size=QWEN3_VOCAB, labelled=0.5),
    "tiny": Shape(rows=37, width=12, vocab_size=53, labelled=0.6, dtype="float32"),
    "tiny_one_row": Shape(rows=1, width=7, vocab_size=3, labelled=1.0, dtype="float32"),
}
