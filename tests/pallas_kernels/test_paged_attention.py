"""The op against its sentence, read slot by slot in numpy; every body passes the same tests."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bodies import Body
from pallas_kernels.paged_attention import paged_attention, write_pages
from pallas_kernels.paged_attention.tiles import TpuTiles, TritonTiles

PALLAS = [Body.TRITON, Body.TPU]
BODIES = [Body.REFERENCE, Body.PAGE_WALK, *PALLAS]
# Bodies that sum at absolute positions, page by page.
POSITIONAL = [Body.PAGE_WALK, *PALLAS]
# Several splits, several tiles a split, several row tiles and several pages a step already at 40 slots.
TILES = {
    Body.REFERENCE: None,
    Body.PAGE_WALK: None,
    Body.TRITON: TritonTiles(rows=16, keys=16, split=32),
    Body.TPU: TpuTiles(rows=16, pages_per_step=2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Ragged requests over a pool whose pages lie in random order; what nobody wrote is NaN."""

    tokens: int
    context_len: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    pages_per_request: int = 6

    def arguments(self, dtype=jnp.float32, seed=0):
        random = np.random.default_rng(seed)
        batch, heads = len(self.context_len), (self.heads, self.head_dim)
        num_pages = batch * self.pages_per_request + 2
        table = random.permutation(num_pages)[: batch * self.pages_per_request].reshape(batch, -1)
        pools = np.full((2, num_pages, self.kv_heads, self.page_size, self.head_dim), np.nan)
        for request, context_len in enumerate(self.context_len):
            for slot in range(context_len + self.tokens):
                page = table[request, slot // self.page_size]
                pools[:, page, :, slot % self.page_size] = random.normal(size=(2, self.kv_heads, self.head_dim))
        return (
            jnp.asarray(random.normal(size=(batch, self.tokens, *heads)), dtype),
            jnp.asarray(pools[0], dtype),
            jnp.asarray(pools[1], dtype),
            jnp.asarray(table, jnp.int32),
            jnp.asarray(self.context_len, jnp.int32),
        )

    def tree(self, seed=0):
        """Any subset of the causal mask, one row that sees no new token, and one that sees only itself."""
        shape = (len(self.context_len), self.tokens, self.tokens)
        visible = np.tril(np.random.default_rng(seed).random(shape) < 0.6)
        visible[0, self.tokens // 2] = False
        visible[-1, -1] = np.eye(self.tokens, dtype=bool)[-1]
        return jnp.asarray(visible)


WINDOW = Case(tokens=5, context_len=(0, 37, 90))
CASES = {
    "window": WINDOW,
    "one_token": Case(tokens=1, context_len=(0, 1, 31, 32, 63)),
    "groups_of_5": Case(tokens=3, context_len=(17, 40), heads=10, head_dim=64),
    "one_head_per_key_head": Case(tokens=7, context_len=(20,), heads=2, kv_heads=2),
    "rows_of_two_words": Case(tokens=40, context_len=(9, 50), heads=2, kv_heads=1),
    "page_larger_than_a_tile": Case(tokens=7, context_len=(60, 3), page_size=64, pages_per_request=2),
}


def attend(body, *arguments, **options):
    tiles = TILES[body]
    return jax.jit(functools.partial(paged_attention, body=body, interpret=body in PALLAS, tiles=tiles))(
        *arguments, **options
    )


def by_definition(q, k_pages, v_pages, table, context_len, visible=None):
    """One softmax per row over the list of slots it sees."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (q, k_pages, v_pages))
    batch, tokens, heads, head_dim = q.shape
    page_size, groups = k_pages.shape[2], heads // k_pages.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(batch, tokens, heads):
        new = [u for u in range(t + 1) if visible is None or visible[b, t, u]]
        slots = [*range(int(context_len[b])), *(int(context_len[b]) + u for u in new)]
        if not slots:
            continue
        at = [(int(table[b, slot // page_size]), n // groups, slot % page_size) for slot in slots]
        scores = np.array([k_pages[index] @ q[b, t, n] for index in at]) / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ np.stack([v_pages[index] for index in at])
    return out


@pytest.mark.parametrize(
    ("name", "body"),
    [
        *itertools.product(CASES, PALLAS),
        *itertools.product(["window", "rows_of_two_words"], [Body.REFERENCE, Body.PAGE_WALK]),
    ],
    ids=lambda value: value if isinstance(value, str) else value.value,
)
def test_rows_see_exactly_what_the_definition_says(name, body):
    case = CASES[name]
    arguments = case.arguments()
    for visible in (None, case.tree()):
        got = attend(body, *arguments, visible)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_definition(*arguments, visible), atol=3e-6)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.value)
def test_bfloat16_is_scored_in_float32(body):
    arguments = WINDOW.arguments(jnp.bfloat16)
    got = attend(body, *arguments)
    assert got.dtype == jnp.bfloat16
    # Weights and result are rounded to 8 bits each.
    np.testing.assert_allclose(got.astype(jnp.float32), by_definition(*arguments), atol=2e-2)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.value)
def test_two_runs_agree_in_every_bit(body):
    arguments = WINDOW.arguments()
    np.testing.assert_array_equal(attend(body, *arguments), attend(body, *arguments))


@pytest.mark.parametrize("body", POSITIONAL, ids=lambda body: body.value)
def test_a_request_has_the_same_bits_alone_among_others_and_with_more_capacity(body):
    arguments = Case(tokens=4, context_len=(70, 3, 41)).arguments()
    together = attend(body, *arguments)
    q, k_pages, v_pages, table, context_len = arguments
    for request in range(3):
        one = slice(request, request + 1)
        wider = jnp.pad(table[one], ((0, 0), (0, 7)))
        alone = attend(body, q[one], k_pages, v_pages, wider, context_len[one])
        np.testing.assert_array_equal(alone[0], together[request])


@pytest.mark.parametrize("body", POSITIONAL, ids=lambda body: body.value)
@pytest.mark.parametrize("context_len", [*(pytest.param(each, marks=pytest.mark.proof) for each in (13, 28, 31)), 47])
def test_a_token_has_the_same_bits_in_whichever_forward_it_arrives(body, context_len):
    """The last token of a window of four, read again as the only new token: slots are summed in the same order."""
    q, k_pages, v_pages, table, _ = Case(tokens=4, context_len=(context_len,)).arguments()
    window = attend(body, q, k_pages, v_pages, table, jnp.array([context_len], jnp.int32))
    for token in range(4):
        alone = attend(
            body, q[:, token : token + 1], k_pages, v_pages, table, jnp.array([context_len + token], jnp.int32)
        )
        np.testing.assert_array_equal(alone[:, 0], window[:, token])


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.value)
@pytest.mark.parametrize(("tokens", "page_size", "start"), [(1, 16, 15), (5, 16, 14), (40, 16, 9), (7, 32, 0)])
def test_new_tokens_land_in_their_slots_and_nothing_else_changes(body, tokens, page_size, start):
    case = Case(tokens=tokens, context_len=(start, start + 20), page_size=page_size, pages_per_request=5)
    q, k_pages, v_pages, table, context_len = case.arguments()
    random = np.random.default_rng(1)
    new = [random.normal(size=(2, tokens, 2, 16)).astype(np.float32) for _ in "kv"]
    want = [np.array(k_pages), np.array(v_pages)]
    for pool, values in zip(want, new, strict=True):
        for b, t in np.ndindex(2, tokens):
            slot = int(context_len[b]) + t
            pool[int(table[b, slot // page_size]), :, slot % page_size] = values[b, t]
    got = write_pages(
        (k_pages, v_pages),
        (jnp.asarray(new[0]), jnp.asarray(new[1])),
        table,
        context_len,
        body=body,
        interpret=body in PALLAS,
    )
    for pool, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(pool, expected)
    del q


@pytest.mark.parametrize("body", PALLAS, ids=lambda body: body.value)
def test_float32_tokens_are_rounded_to_the_dtype_of_the_pages(body):
    q, k_pages, v_pages, table, context_len = WINDOW.arguments(jnp.bfloat16)
    new = (jnp.full((3, 5, 2, 16), 1.001, jnp.float32),) * 2
    got = write_pages((k_pages, v_pages), new, table, context_len, body=body, interpret=True)
    want = write_pages((k_pages, v_pages), new, table, context_len)
    for pool, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(pool.astype(jnp.float32), expected.astype(jnp.float32))
    del q


def test_later_tokens_are_never_seen_whatever_the_mask_says():
    arguments = WINDOW.arguments()
    everything = jnp.ones((3, 5, 5), bool)
    for body in BODIES:
        np.testing.assert_array_equal(attend(body, *arguments, everything), attend(body, *arguments))


def test_malformed_arguments_name_what_is_wrong():
    # Unwrapped: the shape hints that the test run enforces would otherwise answer first.
    op, write = inspect.unwrap(paged_attention), inspect.unwrap(write_pages)
    q, k, v, table, context_len = WINDOW.arguments()
    with pytest.raises(ValueError, match=r"heads of 8, but .*of 16"):
        op(q[..., :8], k, v, table, context_len)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        op(q[:, :, :3], k, v, table, context_len)
    with pytest.raises(ValueError, match="has 3 requests"):
        op(q, k, v, table[:2], context_len)
    with pytest.raises(TypeError, match="must be the same floating dtype"):
        op(q.astype(jnp.bfloat16), k, v, table, context_len)
    with pytest.raises(TypeError, match=r"page_table.dtype=.*float32"):
        op(q, k, v, table.astype(jnp.float32), context_len)
    with pytest.raises(ValueError, match="at most 64; pass visible=None"):
        op(jnp.tile(q, (1, 13, 1, 1)), k, v, table, context_len, jnp.ones((3, 65, 65), bool))
    with pytest.raises(ValueError, match="do not fit"):
        write((k, v), (q, q), table, context_len)
    with pytest.raises(NotImplementedError, match=r"triton body needs a page size.*other bodies: reference"):
        op(q, k[:, :, :15], v[:, :, :15], table, context_len, body=Body.TRITON)
    with pytest.raises(
        NotImplementedError, match=r"triton body needs a page size that is a power of two of at least 16, not 8"
    ):
        op(q, k[:, :, :8], v[:, :, :8], table, context_len, body=Body.TRITON)
    with pytest.raises(NotImplementedError, match=r"tpu body needs a page size"):
        op(q, k[:, :, :8], v[:, :, :8], table, context_len, body=Body.TPU)
    with pytest.raises(TypeError, match="are not TritonTiles"):
        op(q, k, v, table, context_len, body=Body.TRITON, tiles=TpuTiles())
    with pytest.raises(ValueError, match="rows=24 must be a power of two"):
        TritonTiles(rows=24)
