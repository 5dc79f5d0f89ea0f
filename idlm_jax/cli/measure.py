"""`idlm measure`: how far a checkpoint agrees with its own drafts, and what that is worth in tokens per forward."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

import idlm_jax
from idlm_jax import options
from idlm_jax.cli.checkout import import_from_checkout
from idlm_jax.cli.consistency_plot import plot_consistency
from idlm_jax.cli.consistency_report import as_json, as_markdown, consistency_tables, heldout_table
from idlm_jax.cli.domains import named_paths, read_prompt_file, rendered, spread
from idlm_jax.cli.evaluate import heldout_means
from idlm_jax.cli.provenance import provenance
from idlm_jax.decoding.method import ISD, BlockDiffusion, Method, TwoPass

Item = TypeVar("Item")

RULES = ("exact", "coupled", "official")
PROPOSALS = ("sampled", "argmax")
PICTURES = (".png", ".svg", ".pdf")


def measure(
    model: Annotated[str, typer.Argument(help="Hugging Face folder of a Qwen3 or I-DLM checkpoint, or a hub id.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help='[NAME=]FILE.jsonl of one domain, repeated as you like; a line is {"prompt": "text" or [ids]} or '
            '{"messages": [...]}, a chat to answer.'
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]FOLDER written by `idlm pack`: its held-out rows are a domain, and give the losses."),
    ] = None,
    adapter: options.Adapter = None,
    strides: Annotated[str, typer.Option(help="Strides, 2..16, comma-separated. AR is always measured.")] = "2,4",
    branches: Annotated[
        str, typer.Option(help="Groups of MASKs per forward, comma-separated; 'full' is one behind every prefix.")
    ] = "1",
    budgets: Annotated[
        str | None,
        typer.Option(
            "--rows", help="Also forwards of so many query rows, comma-separated, each at every stride that it fits."
        ),
    ] = None,
    rules: Annotated[
        str,
        typer.Option(help="exact, coupled, official, comma-separated; official has argmax proposals and one group."),
    ] = "exact",
    proposals: Annotated[str, typer.Option(help="How drafts are taken: sampled, argmax, comma-separated.")] = "sampled",
    two_pass: Annotated[
        bool, typer.Option("--two-pass", help="Also draft and verify in forwards of their own, at each stride.")
    ] = False,
    block_diffusion: Annotated[
        str | None,
        typer.Option(help="Also block diffusion, at these thresholds, comma-separated; 1 fills one MASK a forward."),
    ] = None,
    diffusion_block: options.BlockLength = 4,
    predicts_next: options.PredictsNext = False,
    temperatures: Annotated[str, typer.Option(help="Comma-separated; 0 is greedy.")] = "0,1",
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    num_prompts: Annotated[int, typer.Option(help="Most prompts of each domain, spread evenly.", min=2)] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt from a dataset.", min=1)] = 48,
    max_tokens: options.MaxTokens = 96,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate all of them, past the text's end.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones count up.")] = 0,
    block_length: Annotated[
        int | None,
        typer.Option(help="MASKs per block in the held-out losses; by default the largest stride - 1.", min=1),
    ] = None,
    heldout_batches: Annotated[
        int | None, typer.Option(help="Most batches of 8 held-out rows for the losses; by default all.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests per compiled loop.", min=1)] = 64,
    dtype: options.Dtype = "float32",
    quantize: options.Quantize = None,
    kernels: options.Kernels = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write every figure as JSON here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw acceptance and TPF here (.png, .svg, .pdf).")] = None,
) -> None:
    """Measures introspective consistency: is a draft what the model itself would say, and what is that worth?

    Acceptance is the mean of min(1, p/q) over drafts that were verified, at each depth given that those before were
    accepted. TPF (tokens per forward) is counted, and also predicted from acceptance alone: for completions of
    these lengths, and for an endless one. TPF²/rows is the compute efficiency, 1 for AR. Intervals are 95 %, over
    prompts. docs/measuring.md has the formulas; `idlm eval` measures speed.

    Example: idlm measure Qwen3-8B --adapter I-DLM-8B-lora --prompts code=code.jsonl --prompts chat=chat.jsonl
    """
    drafting = _methods(strides, branches, budgets, rules, proposals, two_pass=two_pass)
    thresholds = _items("--block-diffusion", block_diffusion, float) if block_diffusion is not None else []
    methods = drafting + [
        BlockDiffusion(diffusion_block, threshold, predicts_next=predicts_next) for threshold in thresholds
    ]
    sampling = idlm_jax.SamplingParams(
        max_tokens=max_tokens, top_k=top_k, top_p=top_p, seed=seed, ignore_eos=ignore_eos
    )
    heats = _items(
        "--temperatures", temperatures, lambda text: dataclasses.replace(sampling, temperature=float(text)).temperature
    )
    folders = named_paths(dataset or [], "--dataset")
    files = named_paths(prompts or [], "--prompts", folders)
    if not folders and not files:
        raise ValueError("nothing to measure with: give --prompts FILE.jsonl or --dataset FOLDER")
    if plot and plot.suffix not in PICTURES:
        raise ValueError(f"--plot {plot} must end in one of {', '.join(PICTURES)}")
    by_domain = {name: spread(read_prompt_file(path), num_prompts) for name, path in files.items()}
    if folders:
        data: Any = import_from_checkout("train.data")
        by_domain |= {name: data.heldout_prompts(path, num_prompts, prompt_tokens) for name, path in folders.items()}

    for path in (output, markdown, plot):  # before minutes of measuring
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    lm = idlm_jax.load(model, dtype=dtype, quantize=quantize, adapter=adapter, kernels=kernels)
    asked = {name: rendered(group, lm.tokenizer) for name, group in by_domain.items()}
    rows = idlm_jax.measure(
        lm,
        asked,
        methods,
        temperatures=heats,
        sampling=sampling,
        batch_size=batch_size,
        show_progress=True,
    )
    length = block_length or max(method.num_masks for method in drafting)
    heldout = {
        name: heldout_means(lm, path, block_length=length, limit=heldout_batches) for name, path in folders.items()
    }

    console = Console()
    for table in consistency_tables(rows):
        console.print(table)
    if heldout:
        console.print(heldout_table(heldout))
    requests = dataclasses.asdict(sampling)
    del requests["temperature"]  # every row has its own
    record = provenance(f"idlm {shlex.join(sys.argv[1:])}") | {
        "model": model,
        "adapter": adapter and str(adapter),
        "dtype": dtype,
        "quantize": quantize,
        "num_prompts": {name: len(group) for name, group in asked.items()},
        "sampling": requests,
        "block_length": length,
        "heldout": heldout,
    }
    if output:
        output.write_text(json.dumps(record | {"rows": [as_json(row) for row in rows]}, indent=1) + "\n")
    if markdown:
        markdown.write_text(as_markdown(record, rows))
    if plot:
        plot_consistency(plot, rows)


def _methods(
    strides: str, branches: str, budgets: str | None, rules: str, proposals: str, *, two_pass: bool
) -> list[Method]:
    """Every combination; the official rule has one group and one kind of proposals.

    Raises:
        ValueError: something is misspelt, or ISD knows no such method.
    """
    groups = _items("--branches", branches, lambda text: None if text == "full" else _number(text, "'full'"))
    placed = [] if budgets is None else _items("--rows", budgets, _number)
    chosen = _items("--rules", rules, lambda text: _one_of(text, RULES))
    drafts = _items("--proposals", proposals, lambda text: _one_of(text, PROPOSALS))
    found: list[Method] = []
    for stride in _items("--strides", strides, _number):
        if stride < 2:
            raise ValueError(f"--strides {strides}: {stride} must lie in 2..16; AR, a stride of 1, is always measured")
        for rule in chosen:
            if rule == "official":
                found.append(ISD(stride, proposals="argmax", rule="official"))
                continue
            found += [
                ISD(stride, proposals=kind, branches=stride if count is None else count, rule=rule)
                for count in groups
                for kind in drafts
            ]
            found += [
                ISD(stride, proposals=kind, rule=rule, rows=rows)
                for rows in placed
                if stride < rows <= stride**2
                for kind in drafts
            ]
        if two_pass:
            found.append(TwoPass(stride))
    return list(dict.fromkeys(found))


def _items(option: str, text: str, read: Callable[[str], Item]) -> list[Item]:
    """What a comma-separated option lists, each once.

    Raises:
        ValueError: an entry is unknown, or there is none.
    """
    try:
        return list(dict.fromkeys(read(entry.strip()) for entry in text.split(",")))
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None


def _number(text: str, other: str = "") -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is no number" + (f", nor {other}" if other else ""))
    return int(text)


def _one_of(text: str, known: tuple[str, ...]) -> Any:
    if text not in known:
        raise ValueError(f"{text!r} is none of {', '.join(known)}")
    return text
