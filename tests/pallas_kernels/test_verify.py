"""Verification and drafts of every body against dense probabilities and jax.random, and in distribution."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from pallas_kernels.bodies import Body
from pallas_kernels.verify import Purpose, RowStats, Sampling, TpuTiles, TritonTiles, Verdict, draft, verify
from pallas_kernels.verify.shapes import TINY

TILES = {Body.REFERENCE: None, Body.TRITON: TritonTiles(vocab=128), Body.TPU: TpuTiles(chunk=128, draw=128)}
bodies = pytest.mark.parametrize("body", TILES, ids=lambda body: body.value)
# Drawn from q; point masses; argmax checked against a soft q. Filters in one case: compiling them is most of the time.
KINDS = {"sampled": True, "argmax": False, "official": False}
kinds = pytest.mark.parametrize(("kind", "filtered"), KINDS.items(), ids=list(KINDS))
TILED = TINY["tiny_tiles"]  # most tests share its compiled programs
FIRST, EXCLUDED = 100, 3
FALSE_ALARM = 1e-6


OPTIONS = ("body", "filtered", "all_greedy")


def options_for(body, filtered, all_greedy=False) -> dict:
    choice = {"body": body, "tiles": TILES[body], "interpret": body is not Body.REFERENCE}
    return {"filtered": filtered, "all_greedy": all_greedy, "excluded_id": EXCLUDED, **choice}


@functools.partial(jax.jit, static_argnames=("argmax", *OPTIONS))
def drafted(logits, sampling, *, argmax, **options) -> tuple[jax.Array, RowStats]:
    first = jnp.full(len(logits), FIRST)
    return draft(logits, sampling, first, argmax=argmax, **options_for(**options))


@functools.partial(jax.jit, static_argnames=OPTIONS)
def verified(anchor_logits, proposals, proposal_logits, stats, num_proposals, sampling, **options) -> Verdict:
    args = (anchor_logits, proposals, proposal_logits, stats, num_proposals, sampling, jnp.full(len(proposals), FIRST))
    return verify(*args, **options_for(**options))


def draft_and_verify(
    proposal_logits, anchor_logits, num_proposals, sampling, *, kind="sampled", all_greedy=False, **options
) -> tuple[jax.Array, Verdict]:
    """The proposals of one forward and the verdict of the next.

    Two programs, one after the other: Pallas' TPU interpreter calls back into Python, and two of its kernels at once on
    a machine with two cores can wait for each other forever.
    """
    options |= {"all_greedy": all_greedy}
    proposals, stats = jax.block_until_ready(drafted(proposal_logits, sampling, argmax=kind != "sampled", **options))
    q = (None, None) if kind == "argmax" or all_greedy else (proposal_logits, stats)
    return proposals, jax.block_until_ready(verified(anchor_logits, proposals, *q, num_proposals, sampling, **options))


def dense_probs(logits, sampling, excluded_id) -> jax.Array:
    """Softmax, a sort and a cumulative sum over [B, T, V]."""
    logits = jnp.where(jnp.arange(logits.shape[-1])[None, None] == excluded_id, -jnp.inf, logits)
    temperature, top_k, top_p = (values[:, None, None] for values in sampling[:3])
    scaled = (logits - logits.max(-1, keepdims=True)) / jnp.where(temperature == 0, 1.0, temperature)
    descending = jnp.flip(jnp.sort(scaled, -1), -1)
    k = jnp.where((top_k > 0) & (top_k < logits.shape[-1]), top_k, logits.shape[-1])
    kth = jnp.take_along_axis(descending, jnp.broadcast_to(k - 1, (*scaled.shape[:2], 1)), -1)
    probs = jax.nn.softmax(jnp.where(descending >= kth, descending, -jnp.inf), -1)
    nucleus = jnp.where(jnp.cumsum(probs, -1) - probs < top_p, descending, jnp.inf).min(-1, keepdims=True)
    threshold = jnp.maximum(kth, jnp.where(top_p < 1, nucleus, -jnp.inf))
    soft = jax.nn.softmax(jnp.where(scaled >= threshold, scaled, -jnp.inf), -1)
    return jnp.where(temperature == 0, jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]), soft)


@functools.partial(jax.jit, static_argnames=("purpose", "of"))
def jax_random(weights, seed, purpose, of) -> jax.Array:
    """`of(key, log weights)` with the key of each request and position; weights are [B, T, ...]."""

    def one(row, seed, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), int(purpose))
        return of(key, jnp.log(row))

    return jax.vmap(jax.vmap(one, (0, None, 0)), (0, 0, None))(weights, seed, FIRST + jnp.arange(weights.shape[1]))


def uniform(key, _) -> jax.Array:
    return jax.random.uniform(key)


def densely(proposal_logits, anchor_logits, num_proposals, sampling, *, kind) -> tuple[np.ndarray, list[tuple]]:
    """The same pair of forwards with dense p and q and jax.random, one request and one draft at a time."""
    p, q = (np.asarray(dense_probs(x, sampling, EXCLUDED)) for x in (anchor_logits, proposal_logits))
    drafts = np.argmax(q, axis=2)
    if kind == "sampled":
        drafts = np.asarray(jax_random(q, sampling.seed, Purpose.PROPOSE, jax.random.categorical))
    soft = np.eye(q.shape[2], dtype=np.float32)[drafts] if kind == "argmax" else q
    residual = np.maximum(p[:, :-1] - soft, 0)
    residual = np.where(residual.any(axis=2, keepdims=True), residual, p[:, :-1])
    draws = functools.partial(jax_random, seed=sampling.seed, purpose=Purpose.COMMIT, of=jax.random.categorical)
    corrections, bonuses = draws(residual), draws(p)
    u = jax_random(q[..., 0], sampling.seed, Purpose.ACCEPT, uniform)
    verdicts = []
    for b, count in enumerate(num_proposals):
        at, ratios = 0, np.zeros(q.shape[1], np.float32)
        for j, d in enumerate(drafts[b, :count]):
            ratios[j] = min(1.0, p[b, j, d] / soft[b, j, d])
            at += at == j and bool(u[b, j] * soft[b, j, d] < p[b, j, d])
        verdicts.append((at, int(corrections[b, at] if at < count else bonuses[b, at]), ratios))
    return drafts, verdicts


def forwards(shape):
    """MASK logits, anchor logits not far from them, and how many drafts to check: every number of them."""
    random, batch = np.random.default_rng(0), shape.requests
    q = random.normal(size=(batch, shape.num_masks, shape.vocab_size)) * 3
    p = random.normal(size=(batch, shape.num_masks + 1, shape.vocab_size))
    p[:, :-1] += q
    return q.astype("f"), p.astype("f"), np.arange(batch, dtype=np.int32) % (shape.num_masks + 1)


def samplings(batch, *, temperature=None, filtered=True) -> Sampling:
    """Greedy, plain, top-k, top-p and both, in turn."""
    pick = np.arange(batch) % 5
    temperatures = np.array([0.0, 1.0, 0.7, 1.3, 2.0], "f")[pick]
    return Sampling(
        temperatures if temperature is None else np.full(batch, temperature, "f"),
        np.array([0, 0, 9, 0, 20], np.int32)[pick] * filtered,
        np.where(filtered, np.array([1.0, 1.0, 1.0, 0.8, 0.9], "f")[pick], np.float32(1.0)),
        np.arange(batch, dtype=np.uint32) + np.uint32(7),
    )


@bodies
@pytest.mark.parametrize(
    ("name", "kind", "filtered"),
    [*(("tiny_tiles", *kind) for kind in KINDS.items()), ("tiny_ragged", "sampled", False)],
    ids=str,
)
def test_drafts_and_verdicts_are_those_of_dense_probabilities_and_jax_random(body, name, kind, filtered):
    q, p, num_proposals = forwards(TINY[name])
    sampling = samplings(len(q), filtered=filtered)
    proposals, verdict = draft_and_verify(q, p, num_proposals, sampling, body=body, kind=kind, filtered=filtered)
    expected_proposals, expected = densely(q, p, num_proposals, sampling, kind=kind)
    lengths, tokens, ratios = (list(values) for values in zip(*expected, strict=True))
    assert proposals.tolist() == expected_proposals.tolist()
    assert verdict.accepted_len.tolist() == lengths
    assert verdict.next_token.tolist() == tokens
    np.testing.assert_allclose(verdict.accept_probs, np.stack(ratios), rtol=2e-5, atol=1e-7)
    assert 0 < sum(lengths) < num_proposals.sum()  # both outcomes occur


@bodies
def test_a_request_has_the_same_bits_alone_in_any_batch_and_again(body):
    q, p, num_proposals = forwards(TILED)
    args = (q, p, num_proposals, samplings(len(q), filtered=False))
    run = functools.partial(draft_and_verify, body=body, filtered=False)
    together = run(*args)
    jax.tree.map(np.testing.assert_array_equal, together, run(*args))
    for b in (1, 4, 8):
        alone = run(*jax.tree.map(lambda values, b=b: values[b : b + 1], args))
        for one, all in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            # XLA fuses the reference's sums as the batch size suggests to it; the kernels fix their order.
            tolerance = 1e-6 if body is Body.REFERENCE and one.dtype == jnp.float32 else 0
            np.testing.assert_allclose(one[0], all[b], rtol=tolerance, atol=0)


@bodies
@kinds
def test_rows_past_the_proposals_may_hold_anything(body, kind, filtered):
    q, p, num_proposals = forwards(TILED)
    run = functools.partial(draft_and_verify, body=body, kind=kind, filtered=filtered)
    clean = run(q, p, num_proposals, samplings(len(q)))[1]
    q[np.arange(TILED.num_masks)[None] >= num_proposals[:, None]] = np.nan
    p[np.arange(TILED.num_masks + 1)[None] > num_proposals[:, None]] = np.nan
    poisoned = run(q, p, num_proposals, samplings(len(q)))[1]
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


@bodies
@kinds
def test_a_draft_that_is_not_refused_takes_nothing_away_from_p(body, kind, filtered):
    q, p, num_proposals = forwards(TILED)
    q[..., 5] = p[..., 5] = 60.0  # drafted, accepted and drawn again with a probability of 1 but for rounding
    sampling = samplings(len(q), filtered=filtered)
    proposals, verdict = draft_and_verify(q, p, num_proposals, sampling, body=body, kind=kind, filtered=filtered)
    assert (proposals == 5).all()
    assert verdict.accepted_len.tolist() == num_proposals.tolist()
    assert (verdict.next_token == 5).all()


@bodies
def test_a_greedy_batch_needs_no_random_bits_and_ends_as_the_sampler_at_temperature_zero(body):
    q, p, num_proposals = forwards(TILED)
    args = (q, p, num_proposals, samplings(len(q), temperature=0.0, filtered=False))
    run = functools.partial(draft_and_verify, *args, body=body, filtered=False)
    jax.tree.map(np.testing.assert_array_equal, run(), run(all_greedy=True))

    def has_random_bits(all_greedy: bool) -> list[bool]:
        options = {"body": body, "filtered": False, "all_greedy": all_greedy}
        programs = (
            drafted.trace(q, args[-1], argmax=False, **options),
            verified.trace(p, np.zeros(q.shape[:2], np.int32), None, None, num_proposals, args[-1], **options),
        )
        return ["xor" in str(program.jaxpr) for program in programs]  # threefry is made of it, nothing else here is

    assert has_random_bits(all_greedy=False) == [True, True]
    assert has_random_bits(all_greedy=True) == [False, False]


@bodies
def test_a_prefill_has_nothing_to_check_and_draws_from_the_anchor(body):
    q, p, _ = forwards(TILED)
    sampling, none = samplings(len(p)), np.zeros(len(p), np.int32)
    run = functools.partial(draft_and_verify, body=body, filtered=False)
    _, verdict = run(q[:, :0], p[:, :1], none, sampling)
    cold = run(q, p, none, sampling)[1]
    assert verdict.accept_probs.shape == (len(p), 0)
    assert verdict.accepted_len.tolist() == none.tolist()
    assert verdict.next_token.tolist() == cold.next_token.tolist()
    greedy = sampling.temperature == 0
    likeliest = np.where(np.arange(p.shape[2])[None] == EXCLUDED, -np.inf, p[:, 0]).argmax(1)
    np.testing.assert_array_equal(verdict.next_token[greedy], likeliest[greedy])


@bodies
def test_the_excluded_id_is_neither_drafted_nor_committed_nor_accepted(body):
    q, p, num_proposals = forwards(TILED)
    q[..., EXCLUDED] = p[..., EXCLUDED] = 50.0
    sampling = samplings(len(q), filtered=False)
    proposals, verdict = draft_and_verify(q, p, num_proposals, sampling, body=body, filtered=False)
    assert not (proposals == EXCLUDED).any() and not (verdict.next_token == EXCLUDED).any()
    for is_soft in (False, True):
        refused, _ = forced_and_cold(p, is_soft=is_soft, body=body)
        assert not refused.accepted_len.any()
        np.testing.assert_array_equal(refused.accept_probs[:, 0], float(is_soft))  # p = q = 0 counts as equal


@bodies
def test_a_residual_without_mass_falls_back_to_p(body):
    """A draft that p and q both exclude, where p = q: refused, and max(0, p - q) is 0 everywhere."""
    _, p, _ = forwards(TILED)
    forced, cold = forced_and_cold(p, is_soft=True, body=body)
    assert not forced.accepted_len.any()
    np.testing.assert_array_equal(forced.next_token, cold.next_token)
    assert len(set(cold.next_token.tolist())) > len(p) // 2


def forced_and_cold(p, *, is_soft, body) -> list[Verdict]:
    """Verdicts at temperature 1 on the excluded id as first draft, and on none; q is p itself or a point mass."""
    ones = np.ones(len(p), np.int32)
    sampling = Sampling(np.ones(len(p), "f"), 0 * ones, np.ones(len(p), "f"), np.arange(len(p), dtype=np.uint32))
    options = {"filtered": False, "all_greedy": False, "body": body}
    _, stats = jax.block_until_ready(drafted(p[:, :-1], sampling, argmax=True, **options))
    q = (p[:, :-1], stats) if is_soft else (None, None)
    proposals = np.full((len(p), p.shape[1] - 1), EXCLUDED, np.int32)
    counts = (ones, 0 * ones)
    return [jax.block_until_ready(verified(p, proposals, *q, count, sampling, **options)) for count in counts]


def tail(tokens, probs) -> float:
    """Chi-square tail of tokens under a distribution."""
    possible = probs > 0
    counts = np.bincount(tokens, minlength=len(probs))
    if counts[~possible].any():
        return 0.0
    expected = probs[possible] * len(tokens)
    assert expected.min() >= 5
    return float(chi2.sf(((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1))


@functools.cache
def committed(kind, filtered) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """p [3, V]; at each depth the tokens that 4,096 requests with one p and one q committed; and depth 0 done naively.

    The naive correction draws from p after a refusal.
    """
    batch, random = 4096, np.random.default_rng(5)
    q, p = (random.normal(size=(1, rows, 7)).astype("f") for rows in (2, 3))
    p[:, :-1] += q  # far from q, but not so far that no draft survives
    q, p = (np.repeat(x, batch, axis=0) for x in (q, p))
    sampling = Sampling(
        np.full(batch, 0.8, "f"),
        np.full(batch, 5 * filtered, np.int32),
        np.full(batch, 0.9 if filtered else 1.0, "f"),
        np.arange(batch, dtype=np.uint32),
    )
    run = functools.partial(draft_and_verify, sampling=sampling, body=Body.REFERENCE, kind=kind, filtered=filtered)
    proposals, verdict = jax.tree.map(np.asarray, run(q, p, np.full(batch, 2, np.int32)))
    naive = np.asarray(run(q, p, np.zeros(batch, np.int32))[1].next_token)
    length = verdict.accepted_len
    drafts = np.concatenate([proposals, proposals[:, :1]], axis=1)
    by_depth = [np.where(length > j, drafts[:, j], verdict.next_token)[length >= j] for j in range(3)]
    exact = np.asarray(dense_probs(p[:1], jax.tree.map(lambda x: x[:1], sampling), EXCLUDED))[0]
    return exact, by_depth, np.where(length > 0, proposals[:, 0], naive)


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "top_k_top_p"])
@pytest.mark.parametrize("kind", ["sampled", "argmax"])
def test_committed_tokens_are_distributed_as_p_at_every_depth(kind, filtered):
    """Chi-square at three depths, given that the depth was reached; false alarm 1e-6 each.

    The reference alone: the other bodies commit the same tokens, as tested above, but 4,096 requests are slow in an
    interpreter.
    """
    exact, by_depth, _ = committed(kind, filtered)
    for j, tokens in enumerate(by_depth):
        assert len(tokens) > 400
        assert tail(tokens, exact[j]) >= FALSE_ALARM


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "top_k_top_p"])
def test_naive_rules_fail_the_same_test(filtered):
    """Correcting from p instead of from what q left over, and argmax drafts against a soft q."""
    for kind in ("sampled", "argmax"):
        exact, _, naive = committed(kind, filtered)
        assert tail(naive, exact[0]) < FALSE_ALARM**2
    exact, by_depth, _ = committed("official", filtered)
    assert tail(by_depth[0], exact[0]) < FALSE_ALARM**2


def test_malformed_arguments_name_what_is_wrong():
    # Unwrapped: the shape hints that the test run enforces would otherwise answer first.
    op = functools.partial(inspect.unwrap(verify), filtered=False)
    p, proposals, counts = jnp.zeros((2, 3, 40)), jnp.zeros((2, 2), jnp.int32), jnp.zeros(2, jnp.int32)
    sampling = Sampling(jnp.ones(2), counts, jnp.ones(2), jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match=r"proposals.shape=\(2, 3\), but the logits imply \(2, 2\)"):
        op(p, jnp.zeros((2, 3), jnp.int32), None, None, counts, sampling, counts)
    with pytest.raises(ValueError, match="proposal_logits and proposal_stats come together"):
        op(p, proposals, p[:, :2], None, counts, sampling, counts)
    with pytest.raises(ValueError, match=r"proposal_logits.shape=\(2, 3, 40\), but \(2, 2, 40\)"):
        _, stats = draft(p[:, :2], sampling, counts, argmax=True, filtered=False)
        op(p, proposals, p, stats, counts, sampling, counts)
    with pytest.raises(TypeError, match=r"seed.dtype=int32 is no uint32"):
        op(p, proposals, None, None, counts, sampling._replace(seed=counts), counts)
    with pytest.raises(ValueError, match=r"first_position.shape=\(2, 2\)"):
        op(p, proposals, None, None, counts, sampling, proposals)
    with pytest.raises(NotImplementedError, match="jax_triton body does not exist"):
        op(p, proposals, None, None, counts, sampling, counts, body=Body.JAX_TRITON)
