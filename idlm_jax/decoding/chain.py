"""Tokens per forward from acceptance by depth: windows that end at the first refusal, as a chain of two states.

A warm window verifies drafts and commits one token more than it accepts. The next one is cold, with one token and new
drafts, unless a group of MASKs stood behind the prefix at which it ended. A prefill is a cold window.

Leading axes (R) hold chains side by side, one per resample of the prompts, say. NumPy only.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Chain(NamedTuple):
    """What becomes of a warm window with C - 1 drafts."""

    ends: Float[np.ndarray, "*R C"]  # probability that it commits 1, 2, ... C tokens
    covered: Bool[np.ndarray, "*R C"]  # whether the window after it is then warm too


def chain_of(acceptance: Float[np.ndarray, "*R M"], branches: int) -> Chain:
    """The chain of a method.

    Args:
        acceptance: probability that the draft at each depth is accepted, if those before it were; M = 0 for AR.
        branches: groups of MASKs. One stands behind the last draft; several stand behind the prefixes where most
            windows end, a lower bound for placed branches, which follow each window's own drafts. With none, every
            window that verifies is followed by a cold one: drafting and verifying take turns.
    """
    certain = np.ones_like(acceptance, shape=(*acceptance.shape[:-1], 1))
    reached = np.cumprod(np.concatenate([certain, acceptance], axis=-1), axis=-1)
    ends = reached - np.concatenate([reached[..., 1:], 0 * certain], axis=-1)
    if branches == 1:
        return Chain(ends, np.broadcast_to(np.arange(ends.shape[-1]) == ends.shape[-1] - 1, ends.shape))
    rank = np.argsort(np.argsort(-ends, axis=-1, kind="stable"), axis=-1)
    return Chain(ends, rank < branches)


def tokens_per_forward(chain: Chain) -> Float[np.ndarray, "*R"]:
    """TPF of a long completion.

    With one group and the same acceptance p at every depth it is the paper's (2 + p + ... + p^(N-2)) / (2 - p^(N-1))
    (I-DLM, arXiv 2604.11035; Table 3).
    """
    warm = np.sum(chain.ends * np.arange(1, chain.ends.shape[-1] + 1), axis=-1)
    cold = np.sum(np.where(chain.covered, 0.0, chain.ends), axis=-1)  # windows per warm one, with a token each
    return np.asarray((warm + cold) / (1.0 + cold))


def expected_forwards(chain: Chain, lengths: Int[np.ndarray, " U"]) -> Float[np.ndarray, "*R U"]:
    """Forwards until so many tokens are committed, the prefill included.

    More than `lengths / tokens_per_forward(chain)`, for the last window may commit fewer tokens than it could.

    Args:
        chain: of the method.
        lengths: tokens of completions, at least 1 each.
    """
    # Of the tokens still to commit: those of a window that commits 1, 2, ... C of them. None are left below zero.
    after_warm = np.zeros_like(chain.ends)
    after_cold = np.zeros_like(chain.ends)
    cold_by_length = []
    for _ in range(int(lengths.max())):
        cold = 1.0 + after_warm[..., :1]
        warm = 1.0 + np.sum(chain.ends * np.where(chain.covered, after_warm, after_cold), axis=-1, keepdims=True)
        after_warm = np.concatenate([warm, after_warm[..., :-1]], axis=-1)
        after_cold = np.concatenate([cold, after_cold[..., :-1]], axis=-1)
        cold_by_length.append(cold[..., 0])
    return np.stack([cold_by_length[length - 1] for length in lengths], axis=-1)
