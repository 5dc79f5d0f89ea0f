"""Verification by coupling, at one position: whose samples are right, and how often drafts agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from pallas_kernels.verify import Purpose, Sampling, draft, verify, verify_coupled

SAMPLES = 32_768
FALSE_ALARM = 1e-5
P = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
Q = np.array([0.1, 0.1, 0.2, 0.3, 0.3])
TV = np.abs(P - Q).sum() / 2


@pytest.fixture(scope="module")
def sampling() -> Sampling:
    ones = jnp.ones(SAMPLES)
    return Sampling(ones, jnp.zeros(SAMPLES, jnp.int32), ones, jnp.arange(SAMPLES, dtype=jnp.uint32))


def sample(sampling: Sampling, purpose: Purpose, *, coupled: bool) -> tuple[np.ndarray, float]:
    """Committed tokens, one for each seed, and how many drafts were accepted."""

    @jax.jit  # not over constants, which the compiler would fold
    def commit(sampling, position):
        anchors = jnp.broadcast_to(jnp.log(jnp.array(P, jnp.float32)), (SAMPLES, 2, len(P)))
        masks = jnp.broadcast_to(jnp.log(jnp.array(Q, jnp.float32)), (SAMPLES, 1, len(Q)))
        drafts, stats = draft(masks, sampling, position, argmax=False, filtered=False, purpose=purpose)
        one = jnp.ones(SAMPLES, jnp.int32)
        check = verify_coupled if coupled else functools.partial(verify, proposal_logits=masks, proposal_stats=stats)
        verdict = check(anchors, drafts, num_proposals=one, sampling=sampling, first_position=position, filtered=False)
        is_accepted = verdict.accepted_len == 1
        return jnp.where(is_accepted, drafts[:, 0], verdict.next_token), jnp.mean(is_accepted)

    tokens, accepted = commit(sampling, jnp.full(SAMPLES, 7))
    return np.asarray(tokens), float(accepted)


def p_value(tokens: np.ndarray) -> float:
    return float(chisquare(np.bincount(tokens, minlength=len(P)), P * SAMPLES).pvalue)


@pytest.mark.parametrize(
    ("purpose", "coupled"),
    [
        pytest.param(Purpose.PROPOSE, False, marks=pytest.mark.proof),
        (Purpose.COMMIT, True),
        pytest.param(Purpose.PROPOSE, True, marks=pytest.mark.proof),
    ],
)
def test_samples_follow_p(sampling, purpose, coupled):
    assert p_value(sample(sampling, purpose, coupled=coupled)[0]) >= FALSE_ALARM


def test_the_noise_of_a_commit_must_not_draw_drafts_of_the_exact_rule(sampling):
    """A correction would share the noise of the draft that was refused, and tokens that lost to it lose again."""
    assert p_value(sample(sampling, Purpose.COMMIT, coupled=False)[0]) < FALSE_ALARM**2


def test_coupled_tokens_are_those_of_plain_sampling_and_agree_as_often_as_promised(sampling):
    tokens, accepted = sample(sampling, Purpose.COMMIT, coupled=True)
    logits = jnp.broadcast_to(jnp.log(jnp.array(P, jnp.float32)), (SAMPLES, 1, len(P)))
    plain, _ = draft(logits, sampling, jnp.full(SAMPLES, 7), argmax=False, filtered=False, purpose=Purpose.COMMIT)
    np.testing.assert_array_equal(tokens, np.asarray(plain)[:, 0])
    # Three standard deviations of a share of 32,768; and no coupling agrees more often than 1 - TV.
    assert (1 - TV) / (1 + TV) - 0.008 < accepted < 1 - TV + 0.008
    independent = sample(sampling, Purpose.PROPOSE, coupled=True)[1]
    assert independent < accepted - 0.1
