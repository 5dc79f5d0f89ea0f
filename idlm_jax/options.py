"""Options that several command lines share, declared once, and the method that they describe together."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from idlm_jax.decoding.baselines import BlockDiffusion, TwoPass
from idlm_jax.decoding.method import AR, ISD, Choice, Method

Adapter = Annotated[Path | None, typer.Option(help="Folder of a gated LoRA adapter (R-ISD).")]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and matrix products.")]
Quantize = Annotated[Literal["int8", "fp8"] | None, typer.Option(help="Hold the blocks' projections in 8 bits.")]
Kernels = Annotated[str, typer.Option(help="auto (by device), reference, triton, tpu, jax_triton.")]

Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]

Decoder = Annotated[
    Literal["isd", "two-pass", "block-diffusion"],
    typer.Option("--method", help="What decodes: introspective strided decoding, or what it is compared with."),
]
Stride = Annotated[str, typer.Option(help="Most tokens per forward, 1..16; 1 is plain AR; auto: chosen while it runs.")]
MaxStride = Annotated[int, typer.Option(help="The largest that --stride auto may choose, 2..16.")]
Proposals = Annotated[Literal["sampled", "argmax"], typer.Option(help="How drafts are taken; both are exact.")]
Branches = Annotated[
    str, typer.Option(help="Groups of MASKs per forward, 1..stride or auto: more rows, fewer forwards.")
]
Rows = Annotated[
    int | None,
    typer.Option(help="Query rows per forward, stride+1..stride^2, each MASK where it pays most; not with --branches."),
]
Rule = Annotated[
    Literal["exact", "coupled"],
    typer.Option(help="coupled: a seed gives plain AR's own text, whatever is drafted; always so where auto."),
]
BlockLength = Annotated[int, typer.Option(help="Block diffusion: tokens of a block, as trained.")]
Threshold = Annotated[
    float, typer.Option(help="Block diffusion: a MASK is filled at a probability above this; 1: by the share.")
]
DenoisingSteps = Annotated[
    int | None, typer.Option(help="Block diffusion: forwards that fill a block at the latest.", show_default="L")
]
EditThreshold = Annotated[
    float | None, typer.Option(help="Block diffusion: a token gives way to one above this (LLaDA2.1).")
]
PredictsNext = Annotated[
    bool, typer.Option(help="Block diffusion: row i predicts token i + 1, as in models made from AR ones.")
]


def chosen_method(
    decoder: Literal["isd", "two-pass", "block-diffusion"],
    *,
    stride: str,
    max_stride: int,
    proposals: Literal["sampled", "argmax"],
    branches: str,
    rows: int | None,
    rule: Literal["exact", "coupled"],
    block_length: int,
    threshold: float,
    denoising_steps: int | None,
    edit_threshold: float | None,
    predicts_next: bool,
) -> Method:
    """The method that the options above describe; AR for a stride of 1.

    Raises:
        ValueError: as the method's class; or a number is none.
    """
    if decoder == "block-diffusion":
        return BlockDiffusion(block_length, threshold, denoising_steps, edit_threshold, predicts_next=predicts_next)
    most, groups = _number_or_auto("--stride", stride), _number_or_auto("--branches", branches)
    if decoder == "two-pass":
        if most == "auto":
            raise ValueError("two-pass decoding has one stride: 'auto' chooses among those of ISD")
        return TwoPass(most)
    if (most, groups, rows) == (1, 1, None):
        return AR()
    return ISD(most, proposals, groups, rule, max_stride, rows)


def _number_or_auto(name: str, text: str) -> int | Choice:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} {text} is neither a number nor auto") from None
