"""The acceptance rule by itself."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chi2

from idlm_jax.decoding.verify import Verdict, verify

V, M = 5, 3


def run(p, q, proposals, num_proposals, uniforms, seed=0) -> Verdict:
    keys = jax.vmap(jax.vmap(jax.random.key))(
        jnp.arange(p.shape[0] * (M + 1), dtype=jnp.uint32).reshape(p.shape[0], M + 1) + jnp.uint32(seed)
    )
    return verify(*(jnp.asarray(x) for x in (p, proposals, q, num_proposals, uniforms)), keys)


def random_probs(rng, *shape) -> np.ndarray:
    return rng.dirichlet(np.full(V, 0.5), size=shape).astype(np.float32)


def test_equal_distributions_accept_everything():
    rng = np.random.default_rng(0)
    p = random_probs(rng, 64, M + 1)
    proposals = np.argmax(p[:, :M], axis=-1).astype(np.int32)
    u = np.full((64, M), np.nextafter(np.float32(1), np.float32(0)))
    verdict = run(p, p[:, :M], proposals, np.full(64, M, np.int32), u)
    assert verdict.accepted_len.tolist() == [M] * 64
    np.testing.assert_array_equal(verdict.accept_probs, 1.0)


def test_impossible_drafts_are_refused_whatever_the_uniform():
    p = np.zeros((1, M + 1, V), np.float32)
    p[..., 0] = 1.0
    q = np.zeros((1, M, V), np.float32)
    q[..., 1] = 1.0
    verdict = run(p, q, np.full((1, M), 1, np.int32), np.array([M], np.int32), np.zeros((1, M), np.float32))
    assert (int(verdict.accepted_len[0]), int(verdict.next_token[0])) == (0, 0)


def test_everything_after_the_first_refusal_is_dropped():
    p = np.full((1, M + 1, V), 0.2, np.float32)
    q = np.full((1, M, V), 0.2, np.float32)
    q[0, 1] = [0.96, 0.01, 0.01, 0.01, 0.01]
    verdict = run(p, q, np.zeros((1, M), np.int32), np.array([M], np.int32), np.full((1, M), 0.5, np.float32))
    assert int(verdict.accepted_len[0]) == 1
    assert int(verdict.next_token[0]) != 0  # the correction comes from max(0, p - q), which lacks token 0
    np.testing.assert_allclose(verdict.accept_probs[0], [1.0, 0.2 / 0.96, 1.0], rtol=1e-6)


def test_slots_without_proposals_draw_the_bonus_from_the_first_row():
    rng = np.random.default_rng(1)
    p, q = random_probs(rng, 32, M + 1), random_probs(rng, 32, M)
    u = np.zeros((32, M), np.float32)
    cold = run(p, q, np.zeros((32, M), np.int32), np.zeros(32, np.int32), u)
    assert cold.accepted_len.tolist() == [0] * 32
    assert cold.accept_probs.tolist() == [[0.0] * M] * 32
    # the same keys with another q: a cold start must not look at q
    other = run(p, random_probs(rng, 32, M), np.full((32, M), 4, np.int32), np.zeros(32, np.int32), u)
    assert cold.next_token.tolist() == other.next_token.tolist()


def test_the_committed_token_is_distributed_as_p_for_any_q():
    """One draft drawn from q, 40,000 times: chi-square over V cells, false alarm 1e-6."""
    rng = np.random.default_rng(2)
    trials = 40_000
    p_row, q_row = random_probs(rng)[None, None], random_probs(rng)[None, None]
    p = np.broadcast_to(p_row, (trials, M + 1, V))
    q = np.broadcast_to(q_row, (trials, M, V))
    drafts = rng.choice(V, size=(trials, M), p=q_row[0, 0] / q_row[0, 0].sum()).astype(np.int32)
    u = rng.uniform(size=(trials, M)).astype(np.float32)
    verdict = run(p, q, drafts, np.ones(trials, np.int32), u)
    first = np.where(np.asarray(verdict.accepted_len) > 0, drafts[:, 0], np.asarray(verdict.next_token))
    counts, expected = np.bincount(first, minlength=V), trials * p_row[0, 0]
    assert chi2.sf(((counts - expected) ** 2 / expected).sum(), V - 1) > 1e-6
