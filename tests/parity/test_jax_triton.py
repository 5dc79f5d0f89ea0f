"""The kernels in the Triton language against the op's definition, run by Triton's own interpreter on torch tensors.

The interpreter is chosen when Triton is imported, so everything that runs kernels does so in a process of its own. It
shows what the kernels compute, tile by tile; not what Triton's compiler makes of them. It cannot multiply bfloat16
matrices and rounds to bfloat16 by cutting off, hence float16 here; and its products are NumPy's, where the bits of a
row depend on its place among the others, so that whether they do in the kernel is not seen here.
"""

import concurrent.futures
import functools
import multiprocessing
import os

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import jax_triton, reference
from pallas_kernels.paged_attention.tiles import TritonTiles
from tests.pallas_kernels.test_paged_attention import CASES, WINDOW, Case, by_definition

pytestmark = pytest.mark.torch

# Several splits, several tiles a split and several row tiles already at 40 slots.
TILES = TritonTiles(rows=16, keys=16, split=32)


def start_interpreter():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language

    # Its place is a closure, but the interpreter looks names up in the module alone.
    vars(jax_triton)["tl"] = triton.language
    jax_triton.launch = interpret


def interpret(name, kernel, inputs, *, outputs=(), in_place=(), grid, constants, **compiler):
    """Stands in for `jax_triton.launch`; what a kernel does not write stays NaN."""
    import torch

    def to_torch(array):
        return torch.from_numpy(np.array(array))

    changed = [to_torch(array) for array in in_place]
    written = [to_torch(np.full(each.shape, np.nan, each.dtype)) for each in outputs]
    kernel[grid](*(to_torch(array) for array in inputs), *changed, *written, *changed, **constants)
    return tuple(jnp.asarray(tensor.numpy()) for tensor in (*written, *changed))


def call(op, arguments, options):
    return getattr(jax_triton, op)(*arguments, interpret=False, **options)


@pytest.fixture(scope="module")
def interpreted():
    """Calls an op of the body in the process of the interpreter."""
    # Spawned: this process may have imported Triton, and a fork would inherit it.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=start_interpreter) as process:
        yield lambda op, *arguments, **options: process.submit(call, op, arguments, options).result()


@pytest.fixture(scope="module")
def attend(interpreted):
    return functools.partial(interpreted, "paged_attention", tiles=TILES)


@pytest.mark.parametrize("name", CASES)
def test_rows_see_exactly_what_the_definition_says(name, attend):
    case = CASES[name]
    arguments = case.arguments()
    for visible in (None, case.tree()):
        got = attend(*arguments, visible)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_definition(*arguments, visible), atol=3e-6)


def test_float16_is_scored_in_float32(attend):
    arguments = WINDOW.arguments(jnp.float16)
    got = attend(*arguments, None)
    assert got.dtype == jnp.float16
    # Weights and result are rounded to 11 bits each.
    np.testing.assert_allclose(got.astype(jnp.float32), by_definition(*arguments), atol=3e-3)


def test_a_request_has_the_same_bits_alone_among_others_and_with_more_capacity(attend):
    arguments = Case(tokens=4, context_len=(70, 3, 41)).arguments()
    together = attend(*arguments, None)
    q, k_pages, v_pages, table, context_len = arguments
    for request in range(3):
        one = slice(request, request + 1)
        wider = jnp.pad(table[one], ((0, 0), (0, 7)))
        alone = attend(q[one], k_pages, v_pages, wider, context_len[one], None)
        np.testing.assert_array_equal(alone[0], together[request])


BIG = 2.0**26  # BIG + 1 == BIG in float32


@pytest.mark.parametrize(
    ("split", "values", "total"),
    [
        (32, {0: BIG, 40: -BIG, 90: 1.0}, 1.0),  # the first split and the second, then the third
        (96, {0: BIG, 40: -BIG, 90: 1.0}, 1.0),  # the same of the tiles of one split
        (32, {0: 1.0, 40: BIG, 60: -BIG}, 1.0),  # a split by itself
        (96, {0: 1.0, 40: BIG, 60: -BIG}, 0.0),  # and what one split makes of it
    ],
)
def test_tiles_of_a_split_and_then_splits_are_summed_first_to_last(split, values, total, interpreted):
    q, k_pages, v_pages, table, context_len = Case(tokens=1, context_len=(95,)).arguments()
    pool = np.zeros(v_pages.shape, np.float32)
    for slot, value in values.items():
        pool[int(table[0, slot // 16]), :, slot % 16] = value
    tiles = TritonTiles(rows=16, keys=16, split=split)
    # With queries of 0 every one of the 96 weights is 1.
    arguments = jnp.zeros_like(q), k_pages, jnp.asarray(pool), table, context_len, None
    got = interpreted("paged_attention", *arguments, tiles=tiles)
    np.testing.assert_array_equal(got, np.full(got.shape, np.float32(total) / np.float32(96)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("tokens", "page_size", "start"), [(1, 16, 15), (5, 16, 14), (40, 16, 9), (7, 32, 0)])
def test_new_tokens_land_in_their_slots_and_nothing_else_changes(tokens, page_size, start, dtype, interpreted):
    case = Case(tokens=tokens, context_len=(start, start + 20), kv_heads=3, page_size=page_size, pages_per_request=5)
    _, *pages, table, context_len = case.arguments(dtype)
    random = np.random.default_rng(1)
    new = [jnp.asarray(random.normal(size=(2, tokens, 3, 16)), jnp.float32) for _ in pages]
    got = interpreted("write_pages", tuple(pages), tuple(new), table, context_len)
    for pool, old, values in zip(got, pages, new, strict=True):
        want = reference.write_pages(old, values, table, context_len)
        np.testing.assert_array_equal(pool.view(jnp.uint8), want.view(jnp.uint8))  # bits, as NaN is not NaN
