"""How to decode: frozen, hashable descriptions that a compiled loop takes as static arguments."""

import dataclasses
from typing import Literal

from jax.sharding import Mesh

from idlm_jax.decoding.baselines import BlockDiffusion, TwoPass
from pallas_kernels.paged_attention.rows import MAX_TREE_ROWS

MAX_STRIDE = 16

# Query rows of a tile in the bit-for-bit mode: those of stride 8, and of stride 4 with all branches, fit.
TILE_ROWS = 16


Choice = Literal["auto"]


@dataclasses.dataclass(frozen=True)
class AR:
    """One token per forward: the baseline, and the distribution that ISD must reproduce."""

    @property
    def num_masks(self) -> int:
        return 0

    @property
    def window_len(self) -> int:
        """Query rows of a decode forward, W."""
        return 1

    @property
    def menu(self) -> tuple["AR"]:
        """The methods that forwards are chosen from: itself."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class ISD:
    """Introspective strided decoding (arXiv 2604.11035): verify the last drafts and draft anew in one forward.

    Attributes:
        stride: the most tokens one forward can commit, 1 to 16. A stride of 1 is AR. "auto" chooses for each forward
            among AR and the powers of two up to `max_stride`, by what was accepted so far and how long a step takes.
        proposals: "sampled" draws each draft from the model's own distribution at its MASK; "argmax" takes the most
            likely token, whose distribution is then a point mass. Both are exact.
        branches: groups of MASKs per forward, 1 to `stride`. One stands behind the last draft, so a refused draft
            leaves nothing to verify next time (a cold start). With as many as `stride`, every prefix of the drafts has
            its own and no start is cold, at stride^2 rows. In between, the rows of so many groups are `rows`. "auto"
            chooses among the rows of 1, 2 and 4. Source: differs, the reference has one group.
        rule: how drafts are verified.
            "exact": accept with min(1, p/q), correct from the residual (Leviathan et al. 2023). Samples are distributed
            as AR's.
            "coupled": draft and verify with the noise that AR would draw the same place with, and accept a draft that
            is AR's own token. Samples *are* AR's with the same seed, token for token, whatever the stride, the branches
            and the load; a little less is accepted, at least (1 - TV) / (1 + TV) instead of 1 - TV (Daliri et al. 2024,
            arXiv 2408.07978). Where something is "auto", this is the rule, or a seed would not reproduce its text.
            "official": argmax proposals checked against the soft distribution they were not drawn from, as the
            reference implementation does. Its samples are not distributed as AR's; kept for comparison.
        max_stride: the largest stride that "auto" may choose: one more than the block length of training.
        rows: query rows of a forward, from `stride` + 1 to stride^2 (64 at most), in place of `branches`. What the
            pending token and the drafts leave of them is MASKs, each behind the prefix and at the depth where its draft
            is most likely to be of use (`placement`). So many drafts as then stand behind the accepted ones are
            verified next, 0 to `stride` - 1. Exact. Source: differs, the reference has one group.
    """

    stride: int | Choice = 4
    proposals: Literal["sampled", "argmax"] = "sampled"
    branches: int | Choice = 1
    rule: Literal["exact", "coupled", "official"] = "exact"
    max_stride: int = 4
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.stride != "auto" and not (isinstance(self.stride, int) and 1 <= self.stride <= MAX_STRIDE):
            raise ValueError(f"stride={self.stride!r} must lie in 1..{MAX_STRIDE}, or be 'auto'")
        if not 2 <= self.max_stride <= MAX_STRIDE:
            raise ValueError(f"max_stride={self.max_stride} must lie in 2..{MAX_STRIDE}")
        if self.proposals not in ("sampled", "argmax"):
            raise ValueError(f"proposals={self.proposals!r} must be 'sampled' or 'argmax'")
        largest = self.max_stride if self.stride == "auto" else self.stride
        if self.branches != "auto" and not (isinstance(self.branches, int) and 1 <= self.branches <= largest):
            raise ValueError(f"branches={self.branches!r} must lie in 1..{largest}, the stride, or be 'auto'")
        if self.rule not in ("exact", "coupled", "official"):
            raise ValueError(f"rule={self.rule!r} must be 'exact', 'coupled' or 'official'")
        if self.rule == "official" and self.proposals != "argmax":
            raise ValueError("rule='official' is defined for proposals='argmax' only")
        if self.rule == "official" and (self.branches != 1 or self.stride == "auto"):
            raise ValueError("rule='official' has one group of MASKs and one stride: nothing can be branched or 'auto'")
        if self.rows is not None:
            self._check_rows(self.rows)
        if self.window_len > MAX_TREE_ROWS:
            raise ValueError(
                f"stride={self.stride} with branches={self.branches} has {self.window_len} rows a forward, and "
                f"attention takes {MAX_TREE_ROWS}: name as many as it should have with rows="
            )

    def _check_rows(self, rows: int) -> None:
        if self.stride == "auto":
            raise ValueError(f"{rows=} are those of one stride, and stride='auto' has several")
        if self.branches != 1:
            raise ValueError(f"{rows=} stand in place of branches={self.branches!r}: give one of them")
        if self.rule == "official":
            raise ValueError(f"rule='official' has one group of MASKs, so no choice of {rows=}")
        if self.stride == 1:
            raise ValueError(f"{rows=}: a stride of 1 drafts nothing and has one row")
        most = min(self.stride**2, MAX_TREE_ROWS)
        if not self.stride < rows <= most:
            raise ValueError(f"{rows=} must lie in {self.stride + 1}..{most} at stride {self.stride}")

    @property
    def num_masks(self) -> int:
        """MASK rows behind each verified prefix, M = stride - 1; the most that "auto" may choose."""
        return (self.max_stride if self.stride == "auto" else self.stride) - 1

    @property
    def window_len(self) -> int:
        """Query rows of a decode forward: the pending token, M drafts, and M MASKs per branch; the most of "auto"."""
        if "auto" in (self.stride, self.branches):
            return max(method.window_len for method in self.menu)
        if self.rows is not None:
            return self.rows
        return window_len(self.num_masks + 1, int(self.branches))

    @property
    def places_masks(self) -> bool:
        """Whether MASKs compete for rows; else there is one group, or one behind every prefix. Not of "auto"."""
        return self.rows is not None or (self.branches != 1 and self.branches != self.stride)

    @property
    def menu(self) -> tuple["Method", ...]:
        """The methods that forwards are chosen from: itself, unless something is "auto"."""
        if "auto" not in (self.stride, self.branches):
            return (self,)
        most = self.num_masks + 1
        strides = [stride for stride in (1, 2, 4, 8) if stride < most] if self.stride == "auto" else []
        methods: list[Method] = []
        for stride in (*strides, most):
            if stride == 1:
                methods.append(AR())
                continue
            if self.branches != "auto":
                groups = min(self.branches, stride)
                methods.append(dataclasses.replace(self, stride=stride, branches=groups, rule="coupled"))
                continue
            for rows in (window_len(stride, groups) for groups in (1, 2, 4) if groups <= stride):
                if rows <= MAX_TREE_ROWS:
                    methods.append(dataclasses.replace(self, stride=stride, branches=1, rows=rows, rule="coupled"))
        return tuple(methods)


Method = AR | ISD | BlockDiffusion | TwoPass


def check_mask_id(method: Method, mask_token_id: int | None) -> None:
    """Raises ValueError if the method feeds MASKs and the model has no id for them."""
    if mask_token_id is None and (method.num_masks or isinstance(method, BlockDiffusion)):
        raise ValueError(
            f"{method} needs a MASK id and this model has none: pass load(..., mask_token_id=...) or use AR()"
        )


def method_name(method: Method) -> str:
    """Short name for tables and plots."""
    match method:
        case AR():
            return "AR"
        case TwoPass():
            return f"two-pass N={method.stride}"
        case BlockDiffusion():
            return _block_diffusion_name(method)
    kind = "" if (method.proposals, method.rule) == ("sampled", "exact") else f" {method.proposals}, {method.rule}"
    branches = f" x{method.branches}" if method.branches != 1 else ""
    branches += "" if method.rows is None else f" {method.rows} rows"
    return f"ISD N={method.stride}{branches}{kind}"


def _block_diffusion_name(method: BlockDiffusion) -> str:
    steps = method.block_length if method.steps is None else method.steps
    fills = f"{steps} steps" if method.threshold == 1 else f"t={method.threshold:g}"
    edits = "" if method.edit_threshold is None else f", edits t={method.edit_threshold:g}"
    return f"block diffusion b={method.block_length} {fills}{edits}"


def window_len(stride: int, branches: int) -> int:
    """Query rows of a decode forward, W: the pending token, its drafts, and as many MASKs per branch."""
    return stride + branches * (stride - 1)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the compiled step must know; everything else about a request is an array.

    Attributes:
        num_masks: most proposals verified and drafted per forward, M.
        window_len: query rows of a decode forward, W.
        places_masks: MASKs compete for the rows, by how likely they are to be of use.
        argmax_proposals: draft the most likely token instead of a draw.
        soft_proposals: take an argmax draft for a draw from its MASK row's distribution (the official rule).
        coupled: draft and verify with AR's own noise.
        filtered: at least one request uses top-k or top-p, so rows must be searched for thresholds.
        all_greedy: every request has temperature 0: no random bits, no residuals.
        num_top_logprobs: alternatives reported per token; None reports no log-probabilities at all.
        mask_token_id: id fed at MASK rows and removed from every distribution; -1 when the model has none.
        mesh: whose "tensor" axis cuts the model and its KV pool; None for one device.
        group_slots: slots that the bit-for-bit mode computes at a time (`fixed_width`); None is the default mode.
        block: block diffusion, whose forwards are in `block_diffusion`; None for all else.
        two_pass: drafts are made and verified in forwards of their own.
    """

    num_masks: int
    window_len: int
    argmax_proposals: bool
    soft_proposals: bool
    filtered: bool
    all_greedy: bool
    num_top_logprobs: int | None
    mask_token_id: int
    places_masks: bool = False
    coupled: bool = False
    mesh: Mesh | None = None
    group_slots: int | None = None
    block: BlockDiffusion | None = None
    two_pass: bool = False

    def __post_init__(self) -> None:
        if self.block is not None and self.num_top_logprobs is not None:
            raise ValueError("BlockDiffusion reports no log-probabilities: its tokens have none under the whole text")
        if self.group_slots is None:
            return
        if self.block is not None or self.two_pass:
            raise ValueError("deterministic='bitwise' knows AR and ISD only")
        if self.group_slots < 1:
            raise ValueError(f"{self.group_slots=} must be at least 1")
        if self.window_len > TILE_ROWS:
            raise ValueError(
                f"deterministic='bitwise' computes {TILE_ROWS} rows a request, and a window of this method has "
                f"{self.window_len}: a shorter stride, less branches, or rows={TILE_ROWS} fit"
            )

    @property
    def written_rows(self) -> int:
        """Slots that a decode forward needs, from the pending token's on: those of its rows, or of a whole tile.

        Block diffusion reads its block as context, behind which there must be another (`paged_block_attend`).
        """
        if self.block is not None:
            return 2 * self.block.block_length
        return self.window_len if self.group_slots is None else TILE_ROWS

    @property
    def keeps_proposal_logits(self) -> bool:
        """Whether verification needs the distributions that proposals were drawn from; else they are point masses."""
        is_drawn = (not self.argmax_proposals or self.soft_proposals) and self.block is None
        return self.num_masks > 0 and is_drawn and not self.all_greedy and not self.coupled


def step_plan(
    method: Method,
    mask_token_id: int | None,
    *,
    filtered: bool,
    all_greedy: bool,
    num_top_logprobs: int | None,
    mesh: Mesh | None = None,
    group_slots: int | None = None,
) -> StepPlan:
    """The plan of a method's forwards, where nothing is "auto": take one of its `menu`; arguments as in `StepPlan`."""
    return StepPlan(
        num_masks=method.num_masks,
        window_len=method.window_len,
        places_masks=isinstance(method, ISD) and method.places_masks,
        argmax_proposals=isinstance(method, ISD) and method.proposals == "argmax",
        soft_proposals=isinstance(method, ISD) and method.rule == "official",
        coupled=isinstance(method, ISD) and method.rule == "coupled",
        filtered=filtered,
        all_greedy=all_greedy,
        num_top_logprobs=num_top_logprobs,
        mask_token_id=-1 if mask_token_id is None else mask_token_id,
        mesh=mesh,
        group_slots=group_slots,
        block=method if isinstance(method, BlockDiffusion) else None,
        two_pass=isinstance(method, TwoPass),
    )
