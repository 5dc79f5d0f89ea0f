"""How to decode: frozen, hashable descriptions that a compiled loop takes as static arguments."""

import dataclasses
from typing import Literal

from jax.sharding import Mesh

MAX_STRIDE = 16


@dataclasses.dataclass(frozen=True)
class AR:
    """One token per forward: the baseline, and the distribution that ISD must reproduce."""

    @property
    def num_masks(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class ISD:
    """Introspective strided decoding (arXiv 2604.11035): verify the last drafts and draft anew in one forward.

    Attributes:
        stride: the most tokens one forward can commit, 1 to 16. A stride of 1 is AR.
        proposals: "sampled" draws each draft from the model's own distribution at its MASK; "argmax" takes the most
            likely token, whose distribution is then a point mass. Both are exact.
        rule: "exact", or "official": argmax proposals checked against the soft distribution they were not drawn from,
            as the reference implementation does. Its samples are not distributed as AR's; kept for comparison.
    """

    stride: int = 4
    proposals: Literal["sampled", "argmax"] = "sampled"
    rule: Literal["exact", "official"] = "exact"

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= MAX_STRIDE:
            raise ValueError(f"stride={self.stride} must lie in 1..{MAX_STRIDE}")
        if self.proposals not in ("sampled", "argmax"):
            raise ValueError(f"proposals={self.proposals!r} must be 'sampled' or 'argmax'")
        if self.rule not in ("exact", "official"):
            raise ValueError(f"rule={self.rule!r} must be 'exact' or 'official'")
        if self.rule == "official" and self.proposals != "argmax":
            raise ValueError("rule='official' is defined for proposals='argmax' only")

    @property
    def num_masks(self) -> int:
        """MASK rows behind each verified prefix, M = stride - 1."""
        return self.stride - 1


Method = AR | ISD


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the compiled step must know; everything else about a request is an array.

    Attributes:
        num_masks: proposals verified and drafted per forward, M.
        argmax_proposals: draft the most likely token instead of a draw.
        soft_proposals: take an argmax draft for a draw from its MASK row's distribution (the official rule).
        filtered: at least one request uses top-k or top-p, so rows must be searched for thresholds.
        all_greedy: every request has temperature 0: no random bits, no residuals.
        num_top_logprobs: alternatives reported per token; None reports no log-probabilities at all.
        mask_token_id: id fed at MASK rows and removed from every distribution; -1 when the model has none.
        mesh: whose "tensor" axis cuts the model and its KV pool; None for one device.
    """

    num_masks: int
    argmax_proposals: bool
    soft_proposals: bool
    filtered: bool
    all_greedy: bool
    num_top_logprobs: int | None
    mask_token_id: int
    mesh: Mesh | None = None

    @property
    def keeps_proposal_logits(self) -> bool:
        """Whether verification needs the distributions that proposals were drawn from; else they are point masses."""
        is_drawn = not self.argmax_proposals or self.soft_proposals
        return self.num_masks > 0 and is_drawn and not self.all_greedy
