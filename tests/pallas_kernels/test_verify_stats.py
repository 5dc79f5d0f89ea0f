"""Row statistics of every body against a sort in float64, and random bits against jax.random."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bodies import Body
from pallas_kernels.verify import Purpose, RowStats, TpuTiles, TritonTiles, row_stats, threefry
from pallas_kernels.verify.maths import from_order_key, order_key, probs
from pallas_kernels.verify.shapes import TINY

TILES = {Body.REFERENCE: None, Body.TRITON: TritonTiles(vocab=128), Body.TPU: TpuTiles(chunk=128, draw=128)}
bodies = pytest.mark.parametrize("body", TILES, ids=lambda body: body.value)
VOCAB_SIZES = sorted(shape.vocab_size for shape in TINY.values())
EXCLUDED = 17
ANY_K = 10_000  # above every vocabulary here
CASES = list(itertools.product((0.0, 0.3, 1.0, 2.5, 1e-30), (0, 1, 5, ANY_K), (1.0, 0.9, 0.3, 1e-6)))
COLUMNS = [np.array(column, dtype) for column, dtype in zip(zip(*CASES, strict=True), "fif", strict=True)]


@functools.partial(jax.jit, static_argnames=("filtered", "body", "excluded_id"))
def stats_of(logits, temperature, top_k, top_p, *, body, filtered=True, excluded_id=EXCLUDED) -> RowStats:
    options = {"filtered": filtered, "excluded_id": excluded_id, "body": body, "tiles": TILES[body]}
    return row_stats(logits, temperature, top_k, top_p, interpret=body is not Body.REFERENCE, **options)


def rows(vocab_size, dtype=np.float32, seed=0) -> np.ndarray:
    """One row per case; every third is full of ties, every fourth half impossible, every 16th for two tiles."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(CASES), vocab_size)) * 3
    logits[::3] = np.round(logits[::3])
    logits[1::4, ::2] = -np.inf
    if vocab_size > 256:
        logits[::16, :256] = -np.inf
    return logits.astype(dtype)


def by_sorting(logits, temperature, top_k, top_p) -> tuple[np.ndarray, np.ndarray, float]:
    """Kept ids, probabilities, and how close a set's mass comes to top_p, of one row."""
    x = logits.astype(np.float64)
    x[EXCLUDED] = -np.inf
    weights = np.exp((x - x.max()) / (temperature or 1.0))
    kept = np.ones(len(x), bool)
    if top_k:
        kept &= x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    gap = np.inf
    if top_p < 1.0:
        before = np.array([weights[kept & (x > value)].sum() for value in x]) / weights[kept].sum()
        kept &= before < top_p
        gap = np.abs(before - top_p).min()
    p = np.where(kept, weights, 0.0) / weights[kept].sum()
    return kept, p if temperature else np.eye(len(x))[x.argmax()], gap


@bodies
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_statistics_equal_a_sort_for_every_combination_of_filters(body, vocab_size):
    logits = rows(vocab_size)
    stats = stats_of(logits, *COLUMNS, body=body)
    x = np.where(np.arange(vocab_size) == EXCLUDED, -np.inf, logits)
    columns = jax.tree.map(lambda values: values[:, None], stats)
    ids = jnp.broadcast_to(jnp.arange(vocab_size)[None], x.shape)
    ours = probs(jnp.asarray(x), ids, jnp.asarray(COLUMNS[0])[:, None], columns)
    for row, case in enumerate(CASES):
        kept, p, gap = by_sorting(logits[row], *case)
        assert gap > 2e-7, "this case is undecided in float32; take another seed"
        is_possible = x[row] > -np.inf
        np.testing.assert_array_equal((x[row] >= stats.threshold[row]) & is_possible, kept & is_possible, str(case))
        np.testing.assert_allclose(ours[row], p, atol=1e-6, err_msg=str(case))
        assert stats.top_id[row] == x[row].argmax()
        assert stats.top_logit[row] == x[row].max()
        assert stats.mass[row] >= 1.0


@bodies
def test_bfloat16_logits_are_read_as_the_floats_they_are(body):
    logits = rows(384, jnp.bfloat16)
    narrow, wide = (stats_of(jnp.asarray(logits, dtype), *COLUMNS, body=body) for dtype in (jnp.bfloat16, jnp.float32))
    for name in ("top_id", "top_logit"):
        np.testing.assert_array_equal(getattr(narrow, name), getattr(wide, name))
    x = logits.astype(np.float32)
    np.testing.assert_array_equal(x >= narrow.threshold[:, None], x >= wide.threshold[:, None])
    np.testing.assert_allclose(narrow.mass, wide.mass, rtol=1e-6)
    assert (np.isin(narrow.threshold, x) | np.isneginf(narrow.threshold)).all()


@bodies
def test_a_row_without_filters_has_the_same_bits_with_and_without_the_search(body):
    logits = rows(384)
    is_plain = (COLUMNS[1] == 0) & (COLUMNS[2] == 1.0)
    searched, plain = (stats_of(logits, *COLUMNS, body=body, filtered=filtered) for filtered in (True, False))
    for one, other in zip(searched, plain, strict=True):
        np.testing.assert_array_equal(one[is_plain], other[is_plain])
    assert np.isneginf(plain.threshold).all()
    assert not np.array_equal(searched.mass, plain.mass)


@bodies
def test_a_row_has_the_same_bits_alone_in_any_batch_and_again(body):
    logits = rows(384)
    together = stats_of(logits, *COLUMNS, body=body)
    again = stats_of(logits, *COLUMNS, body=body)
    jax.tree.map(np.testing.assert_array_equal, together, again)
    for row in (0, 9, 38):
        alone = stats_of(*(values[row : row + 1] for values in (logits, *COLUMNS)), body=body)
        jax.tree.map(lambda one, all, row=row: np.testing.assert_array_equal(one[0], all[row]), alone, together)


@bodies
def test_equals_are_kept_together_and_the_first_of_them_is_the_top(body):
    logits = np.full((4, 300), -1.0, np.float32)
    logits[:, [40, 140, 290]] = 2.0  # the three largest lie in three tiles
    logits[:, 7] = [0.0, -0.0, 1.0, 2.0]
    logits[:, 8] = [-0.0, 0.0, 1.0, -1.0]
    # The second row's top_p falls between its two zeros: 3 / 18.0 < 0.17 < 3.14 / 18.0.
    top_k, top_p = np.array([4, 0, 1, 2], np.int32), np.array([1.0, 0.17, 1.0, 1e-6], np.float32)
    stats = stats_of(logits, np.ones(4, np.float32), top_k, top_p, body=body)
    assert stats.top_id.tolist() == [40, 40, 40, 7]
    assert (logits >= stats.threshold[:, None]).sum(axis=1).tolist() == [5, 5, 3, 4]
    zero = np.exp(np.float32(-2.0))
    np.testing.assert_allclose(stats.mass, [3 + 2 * zero, 3 + 2 * zero, 3, 4], rtol=1e-6)


@bodies
def test_a_poisoned_row_harms_no_other(body):
    logits = rows(384)
    clean = stats_of(logits, *COLUMNS, body=body)
    logits[10:50] = np.nan
    poisoned = stats_of(logits, *COLUMNS, body=body)
    for one, other in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.delete(one, slice(10, 50)), np.delete(other, slice(10, 50)))


def test_order_keys_order_as_floats_do():
    tiny = np.finfo(np.float32).tiny
    values = np.array(
        [-np.inf, -3e38, -1.5, -tiny, 0.0, tiny, 1.5, np.nextafter(np.float32(1.5), 2), 3e38, np.inf], "f"
    )
    keys = order_key(jnp.asarray(values)[:, None])
    assert (np.diff(np.asarray(keys[:, 0], np.int64)) > 0).all()
    np.testing.assert_array_equal(from_order_key(keys)[:, 0], values)
    assert order_key(jnp.array([[-0.0]])) == order_key(jnp.array([[0.0]]))


@pytest.mark.parametrize("purpose", Purpose)
def test_random_bits_are_those_of_jax_random(purpose):
    for seed, position in itertools.product((0, 1, 2**31, 2**32 - 1), (0, 3, 40_959)):
        theirs = jax.random.fold_in(jax.random.fold_in(jax.random.key(np.uint32(seed)), position), int(purpose))
        ours = threefry.request_key(jnp.uint32(seed), jnp.int32(position), purpose)
        np.testing.assert_array_equal(jax.random.key_data(theirs), ours)
        counters = jnp.arange(999, dtype=jnp.uint32)
        bits = threefry.bits(jax.tree.map(lambda word: jnp.broadcast_to(word, (999,)), ours), counters)
        np.testing.assert_array_equal(jax.random.bits(theirs, (999,)), bits)
        np.testing.assert_array_equal(jax.random.uniform(theirs, (999,)), threefry.uniform(bits))
        np.testing.assert_array_equal(jax.random.gumbel(theirs, (999,)), threefry.gumbel(bits))
        np.testing.assert_array_equal(jax.random.uniform(theirs), threefry.uniform(threefry.bits(ours, counters[0])))


def test_noise_is_finite_for_every_extreme_of_the_bits():
    extremes = jnp.array([0, 2**9 - 1, 2**9, 2**32 - 1], jnp.uint32)
    assert threefry.uniform(extremes).tolist() == [0.0, 0.0, 2.0**-23, 1 - 2.0**-23]
    assert jnp.isfinite(threefry.gumbel(extremes)).all()


def test_malformed_arguments_name_what_is_wrong():
    # Unwrapped: the shape hints that the test run enforces would otherwise answer first.
    op = functools.partial(inspect.unwrap(row_stats), filtered=True)
    logits, ones, ks = jnp.zeros((3, 40)), jnp.ones(3), jnp.ones(3, jnp.int32)
    with pytest.raises(ValueError, match=r"logits.shape=\(40,\) must be \[R, V\]"):
        op(logits[0], ones, ks, ones)
    with pytest.raises(TypeError, match=r"logits.dtype=float16 is neither float32 nor bfloat16"):
        op(logits.astype(jnp.float16), ones, ks, ones)
    with pytest.raises(ValueError, match=r"top_p.shape=\(2,\), but the logits imply \(3,\)"):
        op(logits, ones, ks, ones[:2])
    with pytest.raises(TypeError, match=r"top_k.dtype=float32 is no integer"):
        op(logits, ones, ones, ones)
    with pytest.raises(ValueError, match=r"TpuTiles.*is not for the triton body"):
        op(logits, ones, ks, ones, body=Body.TRITON, tiles=TpuTiles())
    with pytest.raises(NotImplementedError, match="jax_triton body does not exist; other bodies: reference, triton"):
        op(logits, ones, ks, ones, body=Body.JAX_TRITON)
    with pytest.raises(NotImplementedError, match="needs a vocabulary that is a multiple of 128, got 40"):
        op(logits, ones, ks, ones, body=Body.TPU)
    with pytest.raises(NotImplementedError, match=r"holds 3 whole rows twice.*other bodies: reference, triton"):
        op(jnp.zeros((3, 2_200_000)), ones, ks, ones, body=Body.TPU)
    for bad in ({"vocab": 100}, {"vocab": 64}):
        with pytest.raises(ValueError, match="power of two"):
            TritonTiles(**bad)
    with pytest.raises(ValueError, match="draw=100 must be a multiple of 128"):
        TpuTiles(draw=100)
