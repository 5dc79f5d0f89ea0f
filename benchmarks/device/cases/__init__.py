"""One file per op: its named shapes as cases."""

from collections.abc import Callable

from benchmarks.device.case import Case, Setting
from benchmarks.device.cases import (
    gated_lora,
    linear_cross_entropy,
    paged_attention,
    quantized_matmul,
    two_stream_attention,
    verify,
)

# In the order in which they are checked.
_CASES: dict[str, Callable[[Setting], list[Case]]] = {
    "paged_attention": paged_attention.cases,
    "two_stream_attention": two_stream_attention.cases,
    "verify": verify.cases,
    "quantized_matmul": quantized_matmul.cases,
    "linear_cross_entropy": linear_cross_entropy.cases,
    "gated_lora": gated_lora.cases,
}
OPS = tuple(_CASES)


def cases_of(op: str, setting: Setting) -> list[Case]:
    """Cases of the op named `op`, one of `OPS`."""
    return _CASES[op](setting)
