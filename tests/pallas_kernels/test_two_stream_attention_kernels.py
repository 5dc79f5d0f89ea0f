"""What the kernel bodies add to the contract: which tiles they visit, what they keep, what they never read."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from pallas_kernels.bodies import Body
from pallas_kernels.two_stream_attention import SAVED, tiles, two_stream_attention
from pallas_kernels.two_stream_attention.intervals import (
    TileRange,
    find_intervals,
    ranges_of_key_tiles,
    ranges_of_row_tiles,
)
from pallas_kernels.two_stream_attention.shapes import SHAPES, Shape
from pallas_kernels.two_stream_attention.tiles import PassTiles, Tiles

SMALL = PassTiles(rows=16, keys=16)
SMALL_TILES = Tiles(forward=SMALL, query_grads=SMALL, key_grads=SMALL)

every_kernel = pytest.mark.parametrize("body", [Body.TRITON, Body.TPU], ids=lambda body: body.value)


def shape_of(documents, *, length, block_length=3, offset=1):
    return Shape(
        batch=1,
        length=length,
        heads=2,
        kv_heads=1,
        head_dim=16,
        documents=documents,
        block_length=block_length,
        offset=offset,
    )


def streams_of(shape):
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.normal(size=(shape.batch, shape.length, heads, shape.head_dim)), jnp.float32)
        for heads in [shape.heads, shape.kv_heads, shape.kv_heads] * 2
    ]


def masks_of(segment_ids, positions, block_start):
    """The contract's three sentences as masks [B, row that looks, key]: clean by clean, clean by noisy, noisy."""
    looks, seen = (slice(None), slice(None), None), (slice(None), None, slice(None))
    is_mate = (segment_ids[looks] == segment_ids[seen]) & (segment_ids[looks] != 0)
    is_past = is_mate & (positions[seen] <= positions[looks])
    is_before_block = is_mate & (positions[seen] < block_start[looks])
    return is_past, is_before_block, is_past & (block_start[seen] == block_start[looks])


def random_packing(random, *, length):
    """Documents of random lengths, each with its own grid, padding at the end and, sometimes, between them."""
    columns = np.zeros((3, 1, length), np.int32)
    first, number, block_length = 0, 0, int(random.integers(1, 9))
    while first < length:
        size = min(int(random.integers(1, 25)), length - first)
        if random.random() < 0.8:
            number += 1
            position = np.arange(size)
            offset = int(random.integers(block_length))
            block_start = (position + offset) // block_length * block_length - offset
            columns[:, 0, first : first + size] = np.full(size, number), position, block_start
        first += size
    return tuple(columns)


def equations_of(jaxpr) -> Iterator:
    """Every equation of a program, those inside its kernels and loops included."""
    for equation in jaxpr.eqns:
        yield equation
        is_jaxpr = lambda leaf: isinstance(leaf, core.Jaxpr | core.ClosedJaxpr)  # noqa: E731
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(leaf):
                yield from equations_of(leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf)


def live_kernels(jaxpr) -> list[str]:
    """Names of the kernels whose result is used; compilers drop the others."""
    used, names = set(), []
    for equation in equations_of(jaxpr):
        used |= {var for var in equation.invars if isinstance(var, core.Var)}
    for equation in equations_of(jaxpr):
        if equation.primitive.name == "pallas_call" and used & set(equation.outvars):
            names.append(equation.params["name"])
    return names


def test_intervals_are_the_masks():
    random = np.random.default_rng(0)
    for _ in range(20):
        packing = random_packing(random, length=48)
        first, _, block, _ = (np.asarray(array)[:, :, None] for array in find_intervals(*map(jnp.asarray, packing)))
        row, key = np.arange(48)[None, :, None], np.arange(48)[None, None]
        ours = (first <= key) & (key <= row), (first <= key) & (key < block), (block <= key) & (key <= row)
        for got, want in zip(ours, masks_of(*packing), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (8, 16), (16, 4)])
def test_tiles_are_visited_where_something_is_seen_and_whole_where_everything_is(rows, keys):
    random = np.random.default_rng(1)
    for _ in range(20):
        packing = random_packing(random, length=48)
        intervals = find_intervals(*map(jnp.asarray, packing))
        # [B, row tile, row, key tile, key]; the first two masks are about clean keys, the third about noisy ones.
        masks = [mask.reshape(1, 48 // rows, rows, 48 // keys, keys) for mask in masks_of(*packing)]
        is_seen, is_noisy_seen = (masks[0] | masks[1]).any((2, 4)), masks[2].any((2, 4))
        is_whole = (masks[0] & masks[1]).all((2, 4))

        of_rows = np.asarray(ranges_of_row_tiles(intervals, rows=rows, keys=keys))
        of_keys = np.asarray(ranges_of_key_tiles(intervals, rows=rows, keys=keys))
        for bounds, transpose in ((of_rows, False), (of_keys, True)):
            span = TileRange(*(bounds[:, :, index, None] for index in range(bounds.shape[2])))
            number = np.arange(48 // (rows if transpose else keys))[None, None]
            wanted = [mask.swapaxes(1, 2) if transpose else mask for mask in (is_seen, is_noisy_seen, is_whole)]
            visited = (span.lower <= number) & (number < span.upper)
            in_band = (span.band_lower <= number) & (number < span.band_upper)
            whole = (span.full_lower <= number) & (number < span.full_upper)
            assert (visited >= wanted[0]).all() and (in_band >= wanted[1]).all()
            assert (whole <= wanted[2]).all() and (whole <= visited).all() and (in_band <= visited).all()
            np.testing.assert_array_equal(span.lower < span.upper, wanted[0].any(2, keepdims=True))


@pytest.mark.parametrize(("name", "most"), [("qwen3_8b_4k", 1.08), ("qwen3_8b_8k", 1.04), ("qwen3_8b_4k_packed", 1.6)])
def test_scores_computed_are_little_more_than_the_visible_pairs(name, most):
    # Under dense masks, both streams take 3 L^2 scores: 3 times what one long document shows, and 14 times what the
    # packed ones do. What is left over here lies on the diagonal and at the ends of documents, in tiles of 128 x 64.
    shape = SHAPES[name]
    forward = tiles.TRITON["default", 2].forward
    intervals = find_intervals(**shape.indices())
    bounds = ranges_of_row_tiles(intervals, rows=forward.rows, keys=forward.keys)
    span = TileRange(*(bounds[:, :, index] for index in range(bounds.shape[2])))
    visited = 2 * (span.upper - span.lower) + span.band_upper - span.band_lower
    assert 1 <= int(visited.sum()) * forward.rows * forward.keys / shape.visible_pairs < most


@pytest.mark.parametrize("name", ["odd_groups", "odd_blocks"])
def test_a_shape_counts_the_pairs_that_are_visible(name):
    shape = SHAPES[name]
    assert shape.visible_pairs == sum(
        int(mask.sum()) for mask in masks_of(*(np.asarray(array) for array in shape.indices().values()))
    )


@every_kernel
def test_documents_and_padding_that_no_row_of_a_tile_sees_are_never_read(body):
    shape = shape_of((16, 16), length=48)
    op = functools.partial(
        two_stream_attention,
        **shape.indices(),
        body=body,
        tiles=SMALL_TILES,
        interpret=True,
    )

    @jax.jit
    def outs_and_grads(*arrays):
        outs, vjp = jax.vjp(op, *arrays)
        return outs, vjp(outs)

    want = outs_and_grads(*streams_of(shape))
    # The second document alone is finite: a single product with anything else would make it NaN.
    poisoned = [jnp.full_like(array, jnp.nan).at[:, 16:32].set(array[:, 16:32]) for array in streams_of(shape)]
    for got, expected in zip(jax.tree.leaves(outs_and_grads(*poisoned)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got[:, 16:32], expected[:, 16:32])


@every_kernel
def test_no_array_grows_with_the_square_of_the_length(body):
    shape = shape_of((1000,), length=1024)

    def loss(*arrays):
        noisy, clean = two_stream_attention(*arrays, **shape.indices(), body=body, tiles=SMALL_TILES)
        return jnp.sum(noisy) + jnp.sum(clean)

    jaxpr = jax.make_jaxpr(jax.grad(loss, range(6)))(*streams_of(shape))
    assert len([eqn for eqn in equations_of(jaxpr.jaxpr) if eqn.primitive.name == "pallas_call"]) == 4
    sizes = [np.prod(var.aval.shape) for eqn in equations_of(jaxpr.jaxpr) for var in eqn.outvars]
    assert max(sizes) == shape.length * shape.heads * shape.head_dim


@every_kernel
def test_under_rematerialisation_saved_outputs_spare_the_second_forward(body):
    shape = shape_of((32,), length=32)

    def forwards(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def loss(*arrays):
            noisy, clean = two_stream_attention(*arrays, **shape.indices(), body=body, tiles=SMALL_TILES)
            return jnp.sum(jnp.sin(noisy)) + jnp.sum(jnp.sin(clean))

        jaxpr = jax.make_jaxpr(jax.grad(loss, range(6)))(*streams_of(shape))
        return live_kernels(jaxpr.jaxpr).count("two_stream_mix")

    assert forwards(jax.checkpoint_policies.nothing_saveable) == 2
    assert forwards(jax.checkpoint_policies.save_only_these_names(SAVED)) == 1


def test_a_short_input_is_not_padded_to_a_long_tile():
    assert tiles.for_length(Body.TRITON, "NVIDIA H200", 2, 75).largest == 128
    assert tiles.for_length(Body.TRITON, "NVIDIA H200", 2, 20).largest == 32
    assert tiles.for_length(Body.TPU, "TPU v5 lite", 2, 20).largest == 128
    assert tiles.for_length(Body.TPU, "TPU v5 lite", 2, 4096) == tiles.TPU["default", 2]


def test_tiles_that_cannot_be_lowered_are_refused():
    with pytest.raises(ValueError, match="keys=48 must be a power of two"):
        PassTiles(rows=16, keys=48)
    with pytest.raises(ValueError, match=r"self.rows=8 .* must be at least 16"):
        PassTiles(rows=8, keys=16)
