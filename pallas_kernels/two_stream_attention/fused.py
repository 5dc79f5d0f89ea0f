"""The op around the kernels of either body: padding, and the derivative as one `custom_vjp`.

Residuals are the streams, the outputs and one float per row and head; scores are recomputed. Outputs and
statistics carry the name `SAVED`, so `jax.checkpoint_policies.save_only_these_names(SAVED)` keeps them under
rematerialisation and the forward kernel is not run twice.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import Body
from pallas_kernels.two_stream_attention.intervals import Intervals, find_intervals
from pallas_kernels.two_stream_attention.streams import Cotangent, Mixed, Stream
from pallas_kernels.two_stream_attention.tiles import Tiles

SAVED = "two_stream_attention"
Static = tuple[Body, Tiles, bool]
Outs = tuple[Float[Array, "B L N H"] | None, Float[Array, "B L N H"] | None]
Residuals = tuple[Stream | None, Stream, Intervals, Mixed | None, Mixed | None]


def attend(
    noisy: Stream | None,
    clean: Stream,
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    block_start: Int[Array, "B L"],
    body: Body,
    tiles: Tiles,
    interpret: bool,
) -> Outs:
    """Outputs of the streams that have queries, by the kernels of `body`; the package checks that it has some.

    A clean stream without queries is constant.
    """
    length = segment_ids.shape[1]
    missing = -length % tiles.largest

    def pad(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2))

    noisy, clean = jax.tree.map(pad, (noisy, clean))
    intervals = find_intervals(pad(segment_ids), pad(positions), pad(block_start))
    outs = _attend(noisy, clean, intervals, (body, tiles, interpret))
    return jax.tree.map(lambda out: out[:, :length], outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(noisy: Stream | None, clean: Stream, intervals: Intervals, static: Static) -> Outs:
    return _forward(noisy, clean, intervals, static)[0]


def _forward(noisy: Stream | None, clean: Stream, intervals: Intervals, static: Static) -> tuple[Outs, Residuals]:
    body, tiles, interpret = static
    mixed = _kernels_of(body).mix(noisy, clean, intervals, tiles.forward, interpret)
    noisy_mixed, clean_mixed = jax.tree.map(lambda array: checkpoint_name(array, SAVED), mixed)
    outs = noisy_mixed and noisy_mixed.out, clean_mixed and clean_mixed.out
    return outs, (noisy, clean, intervals, noisy_mixed, clean_mixed)


def _backward(
    static: Static,
    residuals: Residuals,
    out_bars: Outs,
) -> tuple[Stream | None, Stream, None]:
    body, tiles, interpret = static
    kernels = _kernels_of(body)
    noisy, clean, intervals, noisy_mixed, clean_mixed = residuals
    noisy_bar = _cotangent(noisy_mixed, out_bars[0])
    clean_bar = _cotangent(clean_mixed, out_bars[1])

    noisy_q_bar, clean_q_bar = kernels.query_grads(
        noisy, clean, noisy_bar, clean_bar, intervals, tiles.query_grads, interpret
    )
    noisy_grads, clean_grads = None, jax.tree.map(jnp.zeros_like, clean)
    if noisy:
        noisy_grads = Stream(
            noisy_q_bar, *kernels.noisy_key_grads(noisy, noisy_bar, intervals, tiles.key_grads, interpret)
        )
    if clean_bar:
        noisy_q = noisy and noisy.q
        key_bars = kernels.clean_key_grads(noisy_q, clean, noisy_bar, clean_bar, intervals, tiles.key_grads, interpret)
        clean_grads = Stream(clean_q_bar, *key_bars)
    return noisy_grads, clean_grads, None


_attend.defvjp(_forward, _backward)


def _kernels_of(body: Body) -> ModuleType:
    """Imported on demand: whoever runs the reference needs neither backend, and jax may drop one of them."""
    if body is Body.TRITON:
        from pallas_kernels.two_stream_attention import triton

        return triton
    from pallas_kernels.two_stream_attention import tpu

    return tpu


def _cotangent(mixed: Mixed | None, out_bar: Float[Array, "B L N H"] | None) -> Cotangent | None:
    if mixed is None or out_bar is None:
        return None
    # Not an einsum: that would become a batch of 1 x 1 matrix products, at the precision of those.
    delta = jnp.sum(mixed.out.astype(jnp.float32) * out_bar.astype(jnp.float32), axis=-1)
    return Cotangent(out_bar, mixed.lse, delta.swapaxes(1, 2))
