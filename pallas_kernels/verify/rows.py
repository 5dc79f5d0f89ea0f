"""The tuples that the op takes, returns and passes between its parts."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt32


class Sampling(NamedTuple):
    """How each request samples.

    Attributes:
        temperature: finite and at least 0; 0 is greedy, a point mass on the likeliest id.
        top_k: keep the k likeliest ids, ties included; 0 keeps all.
        top_p: keep the smallest set of likeliest ids whose mass reaches top_p, after top_k; 1.0 keeps all.
        seed: with position and purpose, the key of all randomness.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]


class Verdict(NamedTuple):
    """Outcome of one verification.

    Attributes:
        accepted_len: drafts accepted, counted from the first; 0..num_proposals.
        next_token: the correction after a rejection, or the bonus when every draft survived.
        accept_probs: min(1, p/q) of each draft given that all before it are right; 0 at and past `num_proposals`.
    """

    accepted_len: Int[Array, " B"]
    next_token: Int[Array, " B"]
    accept_probs: Float[Array, "B M"]


class RowStats(NamedTuple):
    """A row's distribution but for its logits: `maths.probs` gives p(v) from the logit of v alone.

    Attributes:
        top_id: the likeliest id, the first of equals.
        top_logit: its logit.
        threshold: smallest kept logit, a value of the row; -inf where nothing is filtered out. In units of raw logits,
            so that membership is a comparison without arithmetic, which every compiler decides alike.
        mass: sum of exp((logit - top_logit) / T) over the kept ids, at least 1; T = 1 is used where T = 0.
    """

    top_id: Int[Array, "*rows"]
    top_logit: Float[Array, "*rows"]
    threshold: Float[Array, "*rows"]
    mass: Float[Array, "*rows"]


class Refused(NamedTuple):
    """The draft whose distribution q is taken away from p, one per request.

    Attributes:
        is_refused: False leaves p as it is, whatever the other fields hold.
        token: the draft.
        logits: rows that q may be in; None for a q that is a point mass on the draft.
        row: which of them.
        stats: of that row; None like the logits.
    """

    is_refused: Bool[Array, " B"]
    token: Int[Array, " B"]
    logits: Float[Array, "B M V"] | None
    row: Int[Array, " B"]
    stats: RowStats | None
