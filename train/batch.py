"""What the data pipeline hands to the objective: packed rows, every array [B, L]."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int


class Batch(NamedTuple):
    """Packed documents.

    Attributes:
        tokens: clean ids; 0 in padding.
        segment_ids: 1, 2, ... per document within the row; 0 is padding.
        positions: 0-based position inside the document; restarts with each one.
        is_response: the token belongs to a response: it may be replaced by MASK and is supervised. All True in plain
            text, except padding.
        block_phase: one non-negative integer per document, repeated over its tokens; the objective shifts the
            document's block grid by `block_phase % block_length`. All zero when random phases are off.
    """

    tokens: Int[Array | np.ndarray, "B L"]
    segment_ids: Int[Array | np.ndarray, "B L"]
    positions: Int[Array | np.ndarray, "B L"]
    is_response: Bool[Array | np.ndarray, "B L"]
    block_phase: Int[Array | np.ndarray, "B L"]
