"""What ISD is compared with: block diffusion, and drafting in one forward what another verifies."""

import dataclasses

MAX_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class BlockDiffusion:
    """Block diffusion: blocks one after the other, the tokens within a block in any order.

    All rows of a block see each other and the blocks before them. Every forward fills the MASKs it is surest of; when
    none is left, a last forward writes the block's keys and values and commits its tokens. What it samples is its own
    distribution, not AR's. The grid of blocks starts at position 0, so a prompt may end inside one.

    Source: SDAR (arXiv 2510.06303; `generate.py` of JetAstra/SDAR, strategies low_confidence_dynamic and _static), and
    with `edit_threshold` LLaDA2.1 (arXiv 2602.08676; `JointThreshold` of SGLang). Differs: a forward that changes
    nothing in a full block has already written its keys and values, so it commits, where SGLang runs another.

    Attributes:
        block_length: tokens of a block, 1 to 64; the one that the model was trained with.
        threshold: a MASK is filled if its token's probability, after temperature, top-k and top-p (at temperature 0:
            before them), is above this. At 1 none is, and every forward fills its share.
        steps: forwards that fill a block at the latest, 1 to `block_length`; None is `block_length`. Each fills at
            least its share.
        edit_threshold: a token that the block already has, unless it is the prompt's, gives way to another that is the
            likeliest with a probability above this. None edits nothing.
        max_edits: forwards over a full block that may still edit it.
        predicts_next: row i predicts token i + 1, as an AR model's rows do, instead of token i. The first token of a
            block is then drawn when the block before is committed, so blocks of 1 are AR. SDAR and LLaDA predict
            their own token.
    """

    block_length: int = 4
    threshold: float = 0.9
    steps: int | None = None
    edit_threshold: float | None = None
    max_edits: int = 16
    predicts_next: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.block_length <= MAX_BLOCK:
            raise ValueError(f"block_length={self.block_length} must lie in 1..{MAX_BLOCK}")
        if self.steps is not None and not 1 <= self.steps <= self.block_length:
            raise ValueError(f"steps={self.steps} must lie in 1..{self.block_length}, the block length")
        for name in ("threshold", "edit_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in 0..1")
        if self.max_edits < 0:
            raise ValueError(f"max_edits={self.max_edits} must not be negative")

    @property
    def num_masks(self) -> int:
        """One less than the most tokens that a forward commits, as of every method."""
        return self.block_length - 1

    @property
    def window_len(self) -> int:
        """Query rows of a forward."""
        return self.block_length

    @property
    def menu(self) -> tuple["BlockDiffusion"]:
        """The methods that forwards are chosen from: itself."""
        return (self,)

    def share(self, step: int) -> int:
        """MASKs of a block that its forward number `step` fills at least: as even as they go, the larger ones first."""
        steps = self.block_length if self.steps is None else self.steps
        return self.block_length // steps + (step < self.block_length % steps)


@dataclasses.dataclass(frozen=True)
class TwoPass:
    """Self-speculation in two forwards: one commits a token and drafts behind it, the next only verifies.

    The contrast to ISD, which does both in one: same drafts, same verification, same text, fewer rows a forward and
    more forwards. Source: the draft-then-verify shape of diffusion drafters, for instance DFlash (arXiv 2602.06036).

    Attributes:
        stride: the most tokens that a verifying forward commits, 2 to 16.
    """

    stride: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.stride <= 16:
            raise ValueError(f"stride={self.stride!r} must lie in 2..16")

    @property
    def num_masks(self) -> int:
        """MASK rows of a drafting forward, M = stride - 1."""
        return self.stride - 1

    @property
    def window_len(self) -> int:
        """Query rows of a forward: the pending token, and M MASKs or M drafts."""
        return self.stride

    @property
    def menu(self) -> tuple["TwoPass"]:
        """The methods that forwards are chosen from: itself."""
        return (self,)
