"""`idlm trace`: which forward produced which token, in colours, as a picture, or as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

import idlm_jax
from idlm_jax import options
from idlm_jax.cli.checkout import CHECKOUT
from idlm_jax.cli.plots import plot_trace
from idlm_jax.decoding.method import Method, method_name
from idlm_jax.decoding.trace import Forward, Source, token_texts

COLOURS = ("cyan", "yellow", "magenta", "green")  # of one forward and the next
STYLES = {Source.DRAFT: "underline", Source.BONUS: "bold", Source.CORRECTION: "bold", Source.COLD_START: "reverse"}
PICTURES = (".svg", ".png")


def trace(
    prompt: Annotated[str, typer.Argument(help="Text to complete.")] = "def main():",
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; by default the tiny model of the checkout.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a gated LoRA adapter (R-ISD); by default the tiny model's own.")
    ] = None,
    decoder: options.Decoder = "isd",
    stride: options.Stride = "4",
    max_stride: options.MaxStride = 4,
    proposals: options.Proposals = "sampled",
    branches: options.Branches = "1",
    rows: options.Rows = None,
    rule: options.Rule = "exact",
    block_length: options.BlockLength = 4,
    threshold: options.Threshold = 0.9,
    denoising_steps: options.DenoisingSteps = None,
    edit_threshold: options.EditThreshold = None,
    predicts_next: options.PredictsNext = False,
    max_tokens: options.MaxTokens = 48,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    dtype: options.Dtype = "bfloat16",
    kernels: options.Kernels = "auto",
    output: Annotated[Path | None, typer.Option(help="Draw it to this .svg or .png file as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per forward, and nothing else.")] = False,
) -> None:
    """Decodes one prompt a forward at a time and shows what each forward committed, and from what.

    A forward commits the drafts that it accepts and one token more: a bonus when all were accepted, a correction in
    place of the first refused. A forward behind a refusal has nothing to verify (a cold start) unless --branches has
    drafted for that case. Block diffusion commits a block once it is full, and nothing before. Where the terminal has
    no colours, | stands between forwards.

    Example: idlm trace 'for name in sorted(' --branches 4 --output trace.svg
    """
    if output is not None:
        if output.suffix not in PICTURES:
            raise ValueError(f"--output {output} must end in {' or '.join(PICTURES)}")
        output.parent.mkdir(parents=True, exist_ok=True)
    method = options.chosen_method(
        decoder,
        stride=stride,
        max_stride=max_stride,
        proposals=proposals,
        branches=branches,
        rows=rows,
        rule=rule,
        block_length=block_length,
        threshold=threshold,
        denoising_steps=denoising_steps,
        edit_threshold=edit_threshold,
        predicts_next=predicts_next,
    )
    params = idlm_jax.SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if model is None:
        model = str(CHECKOUT / "assets" / "tiny-qwen3-py")
        adapter = CHECKOUT / "assets" / "tiny-qwen3-py-isd" if adapter is None else adapter
    lm = idlm_jax.load(model, dtype=dtype, adapter=adapter, kernels=kernels)
    forwards = list(idlm_jax.trace(lm, prompt, method, params))
    texts = texts_by_forward(lm, forwards)
    if output is not None:
        plot_trace(output, forwards, texts, title=summary(method, forwards))
    if as_json:
        for number, (forward, pieces) in enumerate(zip(forwards, texts, strict=True)):
            print(json.dumps(_record(number, forward, pieces)))
        return
    console = Console()
    console.print(Panel(Text(prompt) + _coloured(forwards, texts, console), title=method_name(method), expand=False))
    console.print(_legend())
    console.print(summary(method, forwards), highlight=False)
    if output is not None:
        console.print(f"drawn: {output}", highlight=False)


def texts_by_forward(lm: idlm_jax.LanguageModel, forwards: Sequence[Forward]) -> list[list[str]]:
    """The text that each token adds, forward by forward."""
    texts = iter(token_texts(lm, [token for forward in forwards for token in forward.token_ids]))
    return [[next(texts) for _ in forward.token_ids] for forward in forwards]


def summary(method: Method, forwards: Sequence[Forward]) -> str:
    """One line: tokens, forwards, and what became of the drafts."""
    tokens = sum(len(forward.token_ids) for forward in forwards)
    verified = sum(forward.num_verified for forward in forwards)
    accepted = sum(forward.num_accepted for forward in forwards)
    cold = sum(forward.is_cold_start for forward in forwards)
    return (
        f"{method_name(method)}: {tokens} tokens in {len(forwards)} forwards, {tokens / len(forwards):.2f} each; "
        f"{accepted} of {verified} drafts accepted, {cold} cold starts"
    )


def _coloured(forwards: Sequence[Forward], texts: Sequence[Sequence[str]], console: Console) -> Text:
    coloured = Text()
    for number, (forward, pieces) in enumerate(zip(forwards, texts, strict=True)):
        if console.color_system is None:
            coloured.append("|")
        for source, piece in zip(forward.sources, pieces, strict=True):
            coloured.append(piece, f"{COLOURS[number % len(COLOURS)]} {STYLES.get(source, '')}")
    return coloured


def _legend() -> Text:
    samples = {
        "accepted draft": STYLES[Source.DRAFT],
        "bonus or correction": STYLES[Source.BONUS],
        "cold start": STYLES[Source.COLD_START],
        "prefill, AR": "",
    }
    return Text("one colour, one forward; ") + Text(", ").join(Text(name, style) for name, style in samples.items())


def _record(number: int, forward: Forward, pieces: Sequence[str]) -> dict[str, object]:
    return {
        "forward": number,
        "token_ids": list(forward.token_ids),
        "texts": list(pieces),
        "sources": [source.name.lower() for source in forward.sources],
        "drafts": list(forward.drafts),
        "num_verified": forward.num_verified,
        "num_accepted": forward.num_accepted,
        "is_cold_start": forward.is_cold_start,
    }
