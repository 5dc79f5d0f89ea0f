"""Bytes on the wire against those that a hand can count."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from train.collectives import sent_bytes

NUM, ROWS = 8, 16
WHOLE = NUM * ROWS * 4 * 4  # float32 [128, 4], cut into eight


def compiled(body, steps: int | None = None) -> str:
    """HLO of the body over eight devices, alone or in a loop."""

    def looped(x):
        return x if steps is None else jax.lax.fori_loop(0, steps, lambda _, x: body(x), x)

    mesh = jax.make_mesh((2, NUM // 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    run = body if steps is None else looped
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
    return jax.jit(mapped).lower(jnp.ones((NUM * ROWS, 4))).compile().as_text()


def gathered(x, axis):
    return x + jax.lax.all_gather(x, axis, tiled=True)[:ROWS]


def scattered(x, axis):
    return jax.lax.psum_scatter(jnp.tile(x, (NUM, 1)), axis, tiled=True)


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (functools.partial(gathered, axis=("a", "b")), "all-gather", WHOLE * 7 / 8),
        (functools.partial(gathered, axis="b"), "all-gather", WHOLE / 2 * 3 / 4),  # its own four devices'
        (functools.partial(scattered, axis=("a", "b")), "reduce-scatter", WHOLE * 7 / 8),
        (lambda x: jax.lax.psum(x, ("a", "b")), "all-reduce", 2 * WHOLE / 8 * 7 / 8),
        (lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]), "collective-permute", WHOLE / 8),
    ],
)
def test_a_collective_sends_what_a_ring_sends(body, kind, expected):
    assert sent_bytes(compiled(body)) == {kind: expected}


def test_a_loop_sends_as_often_as_it_runs():
    assert sent_bytes(compiled(lambda x: jax.lax.psum(x, "a"), steps=5)) == {"all-reduce": 5 * 2 * WHOLE / 8 / 2}


def test_loops_in_loops_multiply():
    def inner(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(x, "a"), x)

    assert sent_bytes(compiled(inner, steps=5)) == {"all-reduce": 15 * 2 * WHOLE / 8 / 2}


def test_a_loop_whose_length_the_data_decides_counts_once():
    def body(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jax.lax.psum(x, ("a", "b")), x)

    assert sent_bytes(compiled(body)) == {"all-reduce": 2 * WHOLE / 8 * 7 / 8}


def test_a_program_of_one_device_sends_nothing():
    assert sent_bytes(jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()) == {}


# What compilers for accelerators write and the CPU's does not: loops without a count, in steps of two; a sum of which a
# part is kept; groups by the axes of a mesh; pairs of start and done, or fusions of one channel.
OTHERS = """\
HloModule jit_step, num_partitions=8

%cond.1 (p: (s32[], bf16[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(36)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.5), direction=LT
}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[8,8] {
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice.1 = bf16[8,8]{1,0} dynamic-slice(%all-reduce.1, %at), dynamic_slice_sizes={8,8}
}

%begun.1 (y: bf16[8]) -> bf16[16] {
  ROOT %all-gather.2 = bf16[16]{0} all-gather(%y), channel_id=7, replica_groups=[4,2]<=[8]
}

%ended.1 (y: bf16[8]) -> bf16[16] {
  ROOT %all-gather.3 = bf16[16]{0} all-gather(%y), channel_id=7, replica_groups=[4,2]<=[8]
}

%body.1 (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %constant.6 = s32[]{:T(128)} constant(2)
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%p), index=0
  %add.1 = s32[]{:T(128)} add(%get-tuple-element.2, %constant.6)
  %fusion.2 = bf16[16]{0} fusion(%y), kind=kCustom, calls=%begun.1
  %fusion.3 = bf16[16]{0} fusion(%y), kind=kCustom, calls=%ended.1
  %fusion.1 = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather-start.1 = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%y), replica_groups=mesh['a'=2,'b'=4] {'a'}
  %all-gather-done.1 = bf16[16]{0} all-gather-done(%all-gather-start.1)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8]{0}) tuple(%add.1, %y)
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %while.1 = (s32[]{:T(128)}, bf16[8]{0}) while(%tuple), condition=%cond.1, body=%body.1
  %all-reduce-start.1 = ((f32[6]{0}), f32[6]{0}) all-reduce-start(%z), replica_groups={}, to_apply=%add
  %all-reduce-done.1 = f32[6]{0} all-reduce-done(%all-reduce-start.1)
}
"""


def test_what_other_compilers_write_is_read():
    assert sent_bytes(OTHERS) == {
        "all-gather": 18 * (2 * 16 * 2 / 2),
        "all-reduce": 2 * 24 * 7 / 8,
        "reduce-scatter": 18 * 64 * 8 * 2 * 7 / 8,
    }


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="unknown groups"):
        sent_bytes(OTHERS.replace("replica_groups={}", "replica_groups=everyone"))
