"""Stages of one run: which steps have which block length and which loss."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import pydantic
from pydantic import Field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a run with a block length of its own; null keys are the run's."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    block_length: Annotated[int, Field(ge=1, le=15, description="MASKs per block; the last stage has the run's")]
    share: Annotated[
        float | None, Field(gt=0, le=1, description="part of all steps; they sum to 1; null in every stage: equal")
    ] = None
    auto_balance: Annotated[bool | None, Field(description="in this stage; null: as in the run")] = None
    kl_weight: Annotated[float | None, Field(ge=0, description="in this stage; null: as in the run")] = None
    tv_weight: Annotated[float | None, Field(ge=0, description="in this stage; null: as in the run")] = None


class Span(NamedTuple):
    """One stage of a run, nothing left open: what is trained in steps `start` up to, not including, `stop`.

    Attributes:
        number: 1 for the first stage.
        start: steps taken before it.
        stop: steps taken after it.
        block_length: MASKs per block.
        auto_balance: alpha is the ratio of the two losses.
        kl_weight: of KL(p || q).
        tv_weight: of TV(p, q).
        depth_weights: `block_length` of them, or none for all ones.
    """

    number: int
    start: int
    stop: int
    block_length: int
    auto_balance: bool
    kl_weight: float
    tv_weight: float
    depth_weights: tuple[float, ...]

    @property
    def has_divergence(self) -> bool:
        """Whether the noisy stream learns from the clean one, by KL or TV."""
        return bool(self.kl_weight or self.tv_weight)


def check_shares(stages: Sequence[Stage]) -> None:
    """Refuses shares that leave open how long a stage is.

    Raises:
        ValueError: some stages have a share and some have none, or the shares do not sum to 1.
    """
    shares = [stage.share for stage in stages if stage.share is not None]
    if shares and len(shares) < len(stages):
        raise ValueError("curriculum: give share in every stage, or in none for equal parts")
    if shares and abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"curriculum: the shares {shares} sum to {sum(shares):g}, not 1")


def cut_steps(stages: Sequence[Stage], steps: int) -> tuple[int, ...]:
    """For every stage, how many steps have been taken when it ends: `steps` for the last."""
    ends = list(itertools.accumulate(stage.share or 1 / len(stages) for stage in stages))
    return (*(round(end * steps) for end in ends[:-1]), steps)


def describe_span(span: Span) -> str:
    """One line for people."""
    extra = [
        "automatic alpha" if span.auto_balance else "",
        f"KL x {span.kl_weight:g}" if span.kl_weight else "",
        f"TV x {span.tv_weight:g}" if span.tv_weight else "",
        f"depths x {' '.join(f'{weight:g}' for weight in span.depth_weights)}" if span.depth_weights else "",
    ]
    blocks = f"steps {span.start + 1:,} to {span.stop:,}, MASK blocks {span.block_length} long"
    return ", ".join([blocks, *filter(None, extra)])
