"""How far drafting rules get on one model: tokens per forward, rows per token, and cold starts, at each stride.

python -m benchmarks.branches    # a quarter of an hour on two cores -> benchmarks/results/branches/<name>.{json,md}

Every rule completes the same held-out prompts. "official" is the reference implementation's: one group of MASKs, argmax
drafts checked against a distribution they were not drawn from (at temperature 1 its samples are not the model's).
"auto" takes what is fastest on the machine at hand, AR among it, so its figures are that machine's.
"""

from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from tqdm import tqdm

import idlm_jax
from benchmarks.record import origin, provenance, write
from idlm_jax.decoding.bootstrap import ratio, resampled
from idlm_jax.decoding.generate import Completion
from idlm_jax.decoding.measure import tally
from idlm_jax.decoding.method import ISD
from train.data import heldout_prompts

RESULTS = Path("benchmarks/results/branches")


def rules(stride: int) -> dict[str, ISD]:
    """What is compared at one stride, by name; the first is what the others are measured against."""
    one_group, full = 2 * stride - 1, stride**2
    # As many as one group has, and a fifth, two fifths of the rest.
    budgets = sorted({one_group + round(share * (full - one_group)) for share in (0.0, 0.2, 0.4)})
    placed = {f"{rows} rows, placed": ISD(stride, rows=rows) for rows in budgets}
    return {
        "official": ISD(stride, proposals="argmax", rule="official"),
        "one group": ISD(stride),
        **placed,
        f"full ({stride} branches)": ISD(stride, branches=stride),
        "one group, coupled": ISD(stride, rule="coupled"),
        f"{one_group} rows, placed, coupled": ISD(stride, rows=one_group, rule="coupled"),
        f"full ({stride} branches), coupled": ISD(stride, branches=stride, rule="coupled"),
        "auto": ISD("auto", branches="auto", max_stride=stride),
    }


def summary(completions: list[Completion], method: ISD, baseline: list[Completion], seed: int) -> dict[str, Any]:
    """Means over all tokens, with 95 % intervals from resampled prompts; ratios resample the same prompts of both."""
    counted, weights = tally(completions), resampled([len(completions)], seed)
    others = tally(baseline)
    tpf = ratio(counted.tokens, counted.forwards, weights)
    over = ratio(others.forwards / others.tokens * counted.tokens, counted.forwards, weights)
    assert tpf is not None and over is not None  # every completion took a forward
    verified, accepted = counted.verified.sum(0), np.sum([each.accepted_by_depth for each in completions], axis=0)
    decodes = counted.forwards.sum() - len(completions)
    return {
        "tokens_per_forward": tpf.value,
        "tokens_per_forward_interval": [tpf.low, tpf.high],
        "over_official": over.value,
        "over_official_interval": [over.low, over.high],
        # Of "auto", nobody counts them.
        "rows_per_token": None if len(method.menu) > 1 else decodes * method.window_len / counted.tokens.sum(),
        "cold_share": counted.cold_starts.sum() / decodes,
        "accepted_by_depth": (accepted / np.maximum(verified, 1)).tolist(),
    }


def measure(
    model: Annotated[str, typer.Option(help="Hugging Face folder.")] = "assets/tiny-qwen3-py",
    adapter: Annotated[Path, typer.Option(help="Gated adapter.")] = Path("assets/tiny-qwen3-py-isd"),
    dataset: Annotated[Path, typer.Option(help="With held-out prompts.")] = Path("runs/data/stdlib_256_lora"),
    strides: Annotated[str, typer.Option(help="Comma-separated.")] = "2,3,4,6,8",
    num_prompts: Annotated[int, typer.Option()] = 128,
    max_tokens: Annotated[int, typer.Option()] = 64,
    name: Annotated[str, typer.Option(help="Of the result files.")] = "tiny-cpu",
) -> None:
    """Measures every rule at every stride, greedily and at temperature 1, and writes the table."""
    lm = idlm_jax.load(model, adapter=adapter, dtype="float32")
    prompts = heldout_prompts(dataset, num_prompts, 48)
    plan = [
        (temperature, int(stride), rule, method)
        for temperature in (0.0, 1.0)
        for stride in strides.split(",")
        for rule, method in rules(int(stride)).items()
        if temperature > 0 or method.rule != "coupled"  # at 0 it is the exact rule
    ]
    record: dict[str, Any] = {
        **provenance(f"python -m benchmarks.branches --strides {strides} --num-prompts {len(prompts)}"),
        "model": model,
        "adapter": str(adapter),
        "max_tokens": max_tokens,
        "rows": [],
    }
    baseline: list[Completion] = []
    for temperature, stride, rule, method in tqdm(plan, unit="rule"):
        params = [
            idlm_jax.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
            for seed in range(len(prompts))
        ]
        completions = idlm_jax.generate(lm, prompts, method, params, batch_size=32)
        baseline = completions if rule == "official" else baseline
        found = summary(completions, method, baseline, seed=stride)
        about = {"temperature": temperature, "stride": stride, "rule": rule, "rows": method.window_len}
        record["rows"].append(about | found)
        write(RESULTS, name, record, markdown(record))
        jax.clear_caches()  # a process may have so many mappings, and a hundred programs take them all
    print(markdown(record))


def figures(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """What `summary` found, for a table: TPF, its ratio, rows a token, acceptance by depth."""
    low, high = row["tokens_per_forward_interval"]
    below, above = row["over_official_interval"]
    tpf = f"{row['tokens_per_forward']:.3f} ({low:.3f}-{high:.3f})"
    over = f"{row['over_official']:.3f} ({below:.3f}-{above:.3f})"
    rows = "" if row["rows_per_token"] is None else f"{row['rows_per_token']:.2f}"
    return tpf, over, rows, " ".join(f"{each:.2f}" for each in row["accepted_by_depth"])


def markdown(record: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"# Drafting rules: {record['model']}",
        "",
        origin(record, "float32") + f" {record['max_tokens']} tokens per prompt; TPF counts the "
        "prefill; rows are query rows of decode forwards; intervals are 95 %, over prompts.",
        "",
        "| T | N | rule | TPF | over official | rows a token | cold starts | accepted by depth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        tpf, over, rows, depths = figures(row)
        ratio = "" if row["rule"] == "official" else over
        lines.append(
            f"| {row['temperature']:g} | {row['stride']} | {row['rule']} | {tpf} | {ratio} | {rows} | "
            f"{row['cold_share']:.1%} | {depths} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(measure)
