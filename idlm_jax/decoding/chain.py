"""Tokens per forward from acceptance by depth: windows that end at the first refusal, as a chain over their drafts.

A window verifies L drafts and commits one token more than it accepts. How many the next one has to verify is decided by
how many MASKs stood behind the prefix at which this one ended: none means that it starts cold. A prefill is a window
without drafts.

Leading axes (R) hold chains side by side, one per resample of the prompts, say. NumPy only.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from idlm_jax.decoding.baselines import TwoPass
from idlm_jax.decoding.method import AR, ISD

# In the long run: how often a completion begins anew. A chain that can stay in several places needs a beginning.
RESTARTS = 1e-9


class Chain(NamedTuple):
    """What becomes of a window with L = 0, 1, ... M drafts; C = M + 1."""

    ends: Float[np.ndarray, "*R C C"]  # by L: probability that it commits 1, 2, ... C tokens
    next_drafts: Int[np.ndarray, "*R C C"]  # those of the window after it


def chain_of(acceptance: Float[np.ndarray, "*R M"], method: AR | ISD | TwoPass) -> Chain:
    """The chain of a method, where nothing is "auto".

    Args:
        acceptance: probability that the draft at each depth is accepted, if those before it were.
        method: its forwards. Placed MASKs are taken to stand where they are of most use on average, an approximation:
            they follow each window's own drafts.
    """
    num_masks = method.num_masks
    certain = np.ones_like(acceptance, shape=(*acceptance.shape[:-1], 1))
    reached = np.cumprod(np.concatenate([certain, acceptance], axis=-1), axis=-1)
    drafts, depth = np.arange(num_masks + 1)[:, None], np.arange(num_masks + 1)
    reached = np.where(depth <= drafts, reached[..., None, :], 0.0)
    ends = reached - np.concatenate([reached[..., 1:], 0 * reached[..., :1]], axis=-1)
    is_last = depth == drafts
    if isinstance(method, TwoPass):
        lengths = np.where(is_last & (drafts == 0), num_masks, 0)
    elif isinstance(method, ISD) and method.places_masks:
        lengths = _placed(ends, acceptance, method.window_len)
    else:
        is_full = isinstance(method, ISD) and method.branches != 1
        lengths = np.where(is_last | is_full, num_masks, 0)
    return Chain(ends, np.broadcast_to(lengths, ends.shape))


def _placed(
    ends: Float[np.ndarray, "*R C C"], acceptance: Float[np.ndarray, "*R M"], num_rows: int
) -> Int[np.ndarray, "*R C C"]:
    """MASKs behind each prefix, given the drafts of a window: those that are most likely to be of use."""
    survives = np.cumprod(acceptance, axis=-1)[..., None, None, :]
    worth = (ends[..., None] * survives).reshape(*ends.shape[:-1], -1)
    rank = np.argsort(np.argsort(-worth, axis=-1, kind="stable"), axis=-1)
    num_left = num_rows - 1 - np.arange(ends.shape[-1])[:, None]
    return np.sum((rank < num_left).reshape(*ends.shape, -1), axis=-1)


def tokens_per_forward(chain: Chain) -> Float[np.ndarray, "*R"]:
    """TPF of a long completion.

    With one group and the same acceptance p at every depth it is the paper's (2 + p + ... + p^(N-2)) / (2 - p^(N-1))
    (I-DLM, arXiv 2604.11035; Table 3).
    """
    ends, next_drafts = chain
    num_states = ends.shape[-1]
    moves = np.sum(ends[..., None] * (next_drafts[..., None] == np.arange(num_states)), axis=-2)
    start = np.zeros((*ends.shape[:-1], 1))
    start[..., 0, :] = RESTARTS
    # How often each number of drafts comes up, s = restarts + (1 - restarts) moves^T s, of which the sum is 1.
    often = np.linalg.solve(np.eye(num_states) - (1 - RESTARTS) * np.swapaxes(moves, -1, -2), start)[..., 0]
    often /= np.sum(often, axis=-1, keepdims=True)
    return np.asarray(np.sum(often[..., None] * ends * np.arange(1, num_states + 1), axis=(-2, -1)))


def expected_forwards(chain: Chain, lengths: Int[np.ndarray, " U"]) -> Float[np.ndarray, "*R U"]:
    """Forwards until so many tokens are committed, the prefill included.

    More than `lengths / tokens_per_forward(chain)`, for the last window may commit fewer tokens than it could.

    Args:
        chain: of the method.
        lengths: tokens of completions, at least 1 each.
    """
    ends, next_drafts = chain
    num_states = ends.shape[-1]
    # By drafts of the next window, with 1, 2, ... C tokens fewer still to commit. Nothing is left to do below none.
    after = np.zeros_like(ends)
    fewer = np.arange(num_states)
    by_length = []
    for _ in range(int(lengths.max())):
        flat = after.reshape(*after.shape[:-2], -1)
        at = (next_drafts * num_states + fewer).reshape(flat.shape)
        rest = np.take_along_axis(flat, at, axis=-1).reshape(ends.shape)
        forwards = 1.0 + np.sum(ends * rest, axis=-1)
        after = np.concatenate([forwards[..., None], after[..., :-1]], axis=-1)
        by_length.append(forwards[..., 0])
    return np.stack([by_length[length - 1] for length in lengths], axis=-1)
