"""What 8-bit weights cost in quality: loss, acceptance of drafts, tokens per forward, and tokens that change.

python -m benchmarks.quantized    # a quarter of an hour on two cores -> benchmarks/results/quantized/<name>.{json,md}

Every form of the weights reads the same held-out rows and completes the same prompts. Nothing here is about speed.
"""

from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jaxtyping import Float
from tqdm import tqdm

import idlm_jax
from benchmarks.record import origin, provenance, write
from idlm_jax.cli.evaluate import heldout_means
from idlm_jax.decoding.bootstrap import Weights, estimate, ratio, resampled
from idlm_jax.decoding.generate import Completion
from idlm_jax.decoding.measure import tally
from train.data import heldout_prompts

RESULTS = Path("benchmarks/results/quantized")
STRIDE = 4
# Name -> options of `load`. The first is what the others are measured against; 8-bit weights meet float32 rows, so that
# their cost stands alone.
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "fp8": {"dtype": "float32", "quantize": "fp8"},
}


def against(completions: list[Completion], baseline: list[Completion], seed: int) -> dict[str, Any]:
    """TPF and its ratio to the baseline's, with 95 % intervals from resampled prompts, the same prompts for both."""
    ours, base, weights = tally(completions), tally(baseline), resampled([len(completions)], seed)

    def over(drawn: Weights) -> Float[np.ndarray, " R"]:
        return (drawn @ ours.tokens) / (drawn @ ours.forwards) / ((drawn @ base.tokens) / (drawn @ base.forwards))

    tpf, times = ratio(ours.tokens, ours.forwards, weights), estimate(over, weights)
    assert tpf is not None and times is not None  # every completion took a forward
    return {
        "tokens_per_forward": tpf.value,
        "tokens_per_forward_interval": [tpf.low, tpf.high],
        "over_baseline": times.value,
        "over_baseline_interval": [times.low, times.high],
        "same_completions": sum(a.token_ids == b.token_ids for a, b in zip(completions, baseline, strict=True)),
    }


def measure(
    model: Annotated[str, typer.Option(help="Hugging Face folder.")] = "assets/tiny-qwen3-py",
    adapter: Annotated[Path, typer.Option(help="Gated adapter.")] = Path("assets/tiny-qwen3-py-isd"),
    dataset: Annotated[Path, typer.Option(help="With held-out rows.")] = Path("runs/data/stdlib_256_lora"),
    num_prompts: Annotated[int, typer.Option()] = 128,
    max_tokens: Annotated[int, typer.Option()] = 64,
    limit: Annotated[int | None, typer.Option(help="Most batches of held-out rows.")] = None,
    name: Annotated[str, typer.Option(help="Of the result files.")] = "tiny-cpu",
) -> None:
    """Measures every form and writes the table."""
    prompts = heldout_prompts(dataset, num_prompts, 48)
    rows: list[dict[str, Any]] = []
    baseline: dict[float, list[Completion]] = {}
    for form, options in tqdm(FORMS.items(), unit="form"):
        lm = idlm_jax.load(model, adapter=adapter, **options)
        heldout = heldout_means(lm, dataset, block_length=STRIDE - 1, limit=limit)
        row: dict[str, Any] = {
            "form": form,
            "param_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)),
            "heldout": heldout,
            "decoding": {},
        }
        for temperature in (0.0, 1.0):
            params = [
                idlm_jax.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
                for seed in range(len(prompts))
            ]
            completions = idlm_jax.generate(lm, prompts, idlm_jax.ISD(stride=STRIDE), params, batch_size=32)
            baseline.setdefault(temperature, completions)
            row["decoding"][f"{temperature:g}"] = against(completions, baseline[temperature], seed=0)
            if temperature == 0:
                ar = idlm_jax.generate(lm, prompts, idlm_jax.AR(), params, batch_size=32)
                row["isd_equals_ar"] = sum(a.token_ids == b.token_ids for a, b in zip(completions, ar, strict=True))
        rows.append(row)
    record = {
        **provenance(
            f"python -m benchmarks.quantized --num-prompts {len(prompts)}"
            + (f" --limit {limit}" if limit is not None else "")
        ),
        "model": model,
        "adapter": str(adapter),
        "num_prompts": len(prompts),
        "max_tokens": max_tokens,
        "rows": rows,
    }
    write(RESULTS, name, record, markdown(record))
    print(markdown(record))


def markdown(record: dict[str, Any]) -> str:
    """The table."""
    count = record["num_prompts"]
    lines = [
        f"# 8-bit weights: {record['model']} with {record['adapter']}",
        "",
        origin(record) + f" Loss is held-out cross-entropy in nats a token, of the "
        "clean stream and of the MASK rows; acceptance is the expected one at temperature 1, by depth of the draft. "
        f"TPF: N = {STRIDE}, {count} held-out prompts, {record['max_tokens']} tokens each, the prefill counted; 95 % "
        'intervals over prompts. "As float32" counts completions without a changed token, "ISD = AR" the greedy '
        "completions of ISD that are those of AR with the same weights.",
        "",
        "| weights | MB | loss clean | loss MASK | acceptance | TPF, T=0 | over float32 | TPF, T=1 | over float32 "
        "| as float32, T=0 | ISD = AR |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        heldout, cells = row["heldout"], []
        for decoded in row["decoding"].values():
            for value in ("tokens_per_forward", "over_baseline"):
                low, high = decoded[f"{value}_interval"]
                cells.append(f"{decoded[value]:.3f} ({low:.3f}-{high:.3f})")
        depths = " ".join(f"{heldout[f'acceptance/depth_{depth}']:.4f}" for depth in range(STRIDE - 1))
        lines.append(
            f"| {row['form']} | {row['param_bytes'] / 1e6:.1f} | {heldout['ce_clean']:.4f} | {heldout['ce_noisy']:.4f} "
            f"| {depths} | {' | '.join(cells)} | {row['decoding']['0']['same_completions']} of {count} "
            f"| {row['isd_equals_ar']} of {count} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(measure)
