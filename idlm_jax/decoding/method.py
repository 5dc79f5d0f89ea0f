"""How to decode: frozen, hashable descriptions that a compiled loop takes as static arguments."""

import dataclasses
from typing import Literal

from jax.sharding import Mesh

MAX_STRIDE = 16

# Query rows of a tile in the bit-for-bit mode: those of stride 8, and of stride 4 with all branches, fit.
TILE_ROWS = 16


@dataclasses.dataclass(frozen=True)
class AR:
    """One token per forward: the baseline, and the distribution that ISD must reproduce."""

    @property
    def num_masks(self) -> int:
        return 0

    @property
    def branches(self) -> int:
        return 1

    @property
    def window_len(self) -> int:
        """Query rows of a decode forward, W."""
        return 1


@dataclasses.dataclass(frozen=True)
class ISD:
    """Introspective strided decoding (arXiv 2604.11035): verify the last drafts and draft anew in one forward.

    Attributes:
        stride: the most tokens one forward can commit, 1 to 16. A stride of 1 is AR.
        proposals: "sampled" draws each draft from the model's own distribution at its MASK; "argmax" takes the most
            likely token, whose distribution is then a point mass. Both are exact.
        branches: groups of MASKs per forward, 1 to `stride`. One stands behind the last draft, so a refused draft
            leaves nothing to verify next time (a cold start). With as many as `stride`, every prefix of the drafts has
            its own and no start is cold, at stride^2 rows. In between, they stand behind the prefixes at which
            verification is most likely to end, by the drafts' own probabilities. All are exact. Source: differs, the
            reference has one group.
        rule: "exact", or "official": argmax proposals checked against the soft distribution they were not drawn from,
            as the reference implementation does. Its samples are not distributed as AR's; kept for comparison.
    """

    stride: int = 4
    proposals: Literal["sampled", "argmax"] = "sampled"
    branches: int = 1
    rule: Literal["exact", "official"] = "exact"

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= MAX_STRIDE:
            raise ValueError(f"stride={self.stride} must lie in 1..{MAX_STRIDE}")
        if self.proposals not in ("sampled", "argmax"):
            raise ValueError(f"proposals={self.proposals!r} must be 'sampled' or 'argmax'")
        if not 1 <= self.branches <= self.stride:
            raise ValueError(f"branches={self.branches} must lie in 1..{self.stride}, the stride")
        if self.rule not in ("exact", "official"):
            raise ValueError(f"rule={self.rule!r} must be 'exact' or 'official'")
        if self.rule == "official" and self.proposals != "argmax":
            raise ValueError("rule='official' is defined for proposals='argmax' only")
        if self.rule == "official" and self.branches > 1:
            raise ValueError("rule='official' has one group of MASKs: branches must be 1")

    @property
    def num_masks(self) -> int:
        """MASK rows behind each verified prefix, M = stride - 1."""
        return self.stride - 1

    @property
    def window_len(self) -> int:
        """Query rows of a decode forward: the pending token, M drafts, and M MASKs per branch."""
        return window_len(self.stride, self.branches)


Method = AR | ISD


def make_method(stride: int, proposals: Literal["sampled", "argmax"], branches: int = 1) -> Method:
    """AR for stride 1, else ISD.

    Raises:
        ValueError: as `ISD`.
    """
    if stride == 1 and branches == 1:
        return AR()
    return ISD(stride=stride, proposals=proposals, branches=branches)


def window_len(stride: int, branches: int) -> int:
    """Query rows of a decode forward, W: the pending token, its drafts, and as many MASKs per branch."""
    return stride + branches * (stride - 1)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the compiled step must know; everything else about a request is an array.

    Attributes:
        num_masks: proposals verified and drafted per forward, M.
        branches: groups of M MASKs per forward.
        argmax_proposals: draft the most likely token instead of a draw.
        soft_proposals: take an argmax draft for a draw from its MASK row's distribution (the official rule).
        filtered: at least one request uses top-k or top-p, so rows must be searched for thresholds.
        all_greedy: every request has temperature 0: no random bits, no residuals.
        num_top_logprobs: alternatives reported per token; None reports no log-probabilities at all.
        mask_token_id: id fed at MASK rows and removed from every distribution; -1 when the model has none.
        mesh: whose "tensor" axis cuts the model and its KV pool; None for one device.
        group_slots: slots that the bit-for-bit mode computes at a time (`fixed_width`); None is the default mode.
    """

    num_masks: int
    argmax_proposals: bool
    soft_proposals: bool
    filtered: bool
    all_greedy: bool
    num_top_logprobs: int | None
    mask_token_id: int
    branches: int = 1
    mesh: Mesh | None = None
    group_slots: int | None = None

    def __post_init__(self) -> None:
        if self.group_slots is None:
            return
        if self.group_slots < 1:
            raise ValueError(f"{self.group_slots=} must be at least 1")
        if self.window_len > TILE_ROWS:
            raise ValueError(
                f"deterministic='bitwise' computes {TILE_ROWS} rows a request, and a window of stride "
                f"{self.num_masks + 1} with branches={self.branches} has {self.window_len}"
            )

    @property
    def written_rows(self) -> int:
        """Rows that a decode forward writes to the cache, from the pending token's slot on."""
        return self.window_len if self.group_slots is None else TILE_ROWS

    @property
    def window_len(self) -> int:
        """Query rows of a decode forward, W."""
        return window_len(self.num_masks + 1, self.branches)

    @property
    def places_branches(self) -> bool:
        """Whether prefixes compete for branches, by how likely verification is to end at each."""
        return self.num_masks > 0 and 1 < self.branches <= self.num_masks

    @property
    def keeps_proposal_logits(self) -> bool:
        """Whether verification needs the distributions that proposals were drawn from; else they are point masses."""
        is_drawn = not self.argmax_proposals or self.soft_proposals
        return self.num_masks > 0 and is_drawn and not self.all_greedy
