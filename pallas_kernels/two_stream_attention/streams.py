"""The bundles that pass between the kernel wrappers: arrays, or the refs and specs that stand for them.

A bundle or a field is None where a pass has no use for it: no noisy stream in plain causal attention, no clean
queries where the clean stream has run before and is constant.
"""

from typing import Any, NamedTuple


class Stream(NamedTuple):
    """q [B, L, N, H], k and v [B, L, K, H] of the noisy or the clean stream."""

    q: Any
    k: Any
    v: Any


class Mixed(NamedTuple):
    """Output of a stream, [B, L, N, H], and its log2-sum-exp2 per row and head, float32 [B, N, L]."""

    out: Any
    lse: Any


class Cotangent(NamedTuple):
    """What the backward pass of a stream starts from.

    `out_bar` [B, L, N, H]; `lse` as in `Mixed`; `delta` = sum over H of out * out_bar, float32 [B, N, L].
    """

    out_bar: Any
    lse: Any
    delta: Any
