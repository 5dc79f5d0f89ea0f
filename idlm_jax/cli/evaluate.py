"""`idlm eval`: loss and acceptance on held-out text, and AR against ISD on held-out prompts."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import idlm_jax
from idlm_jax import options
from idlm_jax.cli.checkout import import_from_checkout
from idlm_jax.cli.tables import method_table
from idlm_jax.decoding.compare import MethodReport, compare_methods
from idlm_jax.model.language_model import LanguageModel


def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder of a Qwen3 or I-DLM checkpoint, or a hub id.")],
    dataset: Annotated[Path, typer.Argument(help="Folder written by `idlm pack`.")],
    adapter: options.Adapter = None,
    strides: Annotated[str, typer.Option(help="Strides to decode with, comma-separated.")] = "2,3,4,8",
    branches: Annotated[
        str, typer.Option(help="Groups of MASKs per forward, comma-separated; 'full' is one behind every prefix.")
    ] = "1",
    block_length: Annotated[int, typer.Option(help="MASKs per block in the teacher-forced measurement.")] = 3,
    num_prompts: Annotated[int, typer.Option(help="Held-out prompts to complete.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 48,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 96,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Requests per compiled loop.")] = 16,
    rounds: Annotated[int, typer.Option(help="Timed repetitions; the median counts.", min=1)] = 1,
    dtype: options.Dtype = "float32",
    quantize: options.Quantize = None,
    kernels: options.Kernels = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON here.")] = None,
) -> None:
    """Measures a checkpoint: held-out loss, acceptance by depth, and TPF of ISD against AR.

    Exits with 1 if greedy ISD and AR differ in any token.
    """
    lm = idlm_jax.load(model, dtype=dtype, quantize=quantize, adapter=adapter, kernels=kernels)
    console = Console()
    means = heldout_means(lm, dataset, block_length=block_length)
    for name, value in means.items():
        console.print(f"{name:32} {value:.4f}")
    data: Any = import_from_checkout("train.data")
    prompts = data.heldout_prompts(dataset, num_prompts, prompt_tokens)
    methods = [
        idlm_jax.ISD(stride=int(stride), branches=int(stride if count == "full" else count))
        for stride in strides.split(",")
        for count in branches.split(",")
    ]
    params = [
        idlm_jax.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
        for seed in range(len(prompts))
    ]
    reports = compare_methods(lm, prompts, methods, params, batch_size=batch_size, rounds=rounds)
    title = (
        f"{len(prompts)} held-out prompts, {max_tokens} tokens each, temperature {temperature:g}, {quantize or dtype}"
    )
    console.print(method_table(title, reports, is_greedy=temperature == 0))
    if output:
        record = {"model": model, "adapter": adapter and str(adapter), "heldout": means}
        record |= {"dtype": dtype, "quantize": quantize}
        record |= {"temperature": temperature, "num_prompts": len(prompts), "max_tokens": max_tokens}
        record |= {"methods": [_as_json(report) for report in reports]}
        output.write_text(json.dumps(record, indent=2) + "\n")
    if temperature == 0 and any(report.num_identical != len(prompts) for report in reports):
        raise typer.Exit(1)


def heldout_means(
    lm: LanguageModel, dataset: Path, *, block_length: int, batch_size: int = 8, limit: int | None = None
) -> dict[str, float]:
    """Held-out cross-entropies and expected acceptance, each also by depth, teacher-forced.

    Args:
        lm: the model.
        dataset: folder written by `idlm pack`.
        block_length: MASKs per block.
        batch_size: rows per forward.
        limit: most batches to measure; None for all.

    Raises:
        ValueError: the folder is no dataset, or its ids exceed the model's vocabulary.
    """
    import jax
    from flax import nnx

    objective: Any = import_from_checkout("train.objective")
    data: Any = import_from_checkout("train.data")
    data.check_vocabulary(dataset, lm.config.vocab_size)
    settings = objective.ObjectiveSettings(block_length=block_length)
    measure = jax.jit(lambda params, batch: objective.measure_acceptance(nnx.merge(lm.graph, params), batch, settings))
    total = None
    for batch in data.heldout_batches(dataset, batch_size, limit):
        terms = measure(lm.params, batch)
        total = terms if total is None else jax.tree.map(lambda a, b: a + b, total, terms)
    assert total is not None  # a dataset always has held-out rows
    return {name: float(term.mean) for name, term in total.items()}


def _as_json(report: MethodReport) -> dict[str, Any]:
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name != "completions"}
    rate = None if math.isnan(report.acceptance_rate) else report.acceptance_rate  # AR's; JSON has no such number
    return fields | {"method": str(report.method), "acceptance_rate": rate}
