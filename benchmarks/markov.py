"""What the Markov head is worth: the same adapters trained with and without it, decoded alike.

Fails where greedy tokens are not those of AR.

    python -m train configs/tiny_lora_cpu.yaml
    python -m train configs/tiny_markov_cpu.yaml block_length=7 run_name=tiny_markov_b7
    python -m train configs/tiny_lora_cpu.yaml block_length=7 run_name=tiny_lora_b7
    python -m benchmarks.markov    # 15 minutes on two cores -> benchmarks/results/markov/tiny-cpu.{json,md}

Each training takes about 25 minutes on two cores, sees the same rows in the same order, and starts from the same base;
the adapter in assets is the fourth. Adapters whose run is not there are left out.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import idlm_jax
from benchmarks.branches import figures, rules, summary
from benchmarks.record import origin, provenance, write
from idlm_jax.cli.evaluate import heldout_means
from idlm_jax.decoding.generate import Completion
from idlm_jax.decoding.method import AR
from train.data import heldout_prompts

RESULTS = Path("benchmarks/results/markov")
BASE, DATASET = "assets/tiny-qwen3-py", Path("runs/data/stdlib_256_lora")
# Name -> adapter, MASKs per block of its training, strides to decode with. The first is what ratios are over.
ADAPTERS: dict[str, tuple[Path, int, tuple[int, ...]]] = {
    "no head": (Path("runs/tiny_lora/adapter"), 3, (4, 8)),
    "head": (Path("assets/tiny-qwen3-py-isd"), 3, (4, 8)),
    "no head, blocks of 7": (Path("runs/tiny_lora_b7/adapter"), 7, (8,)),
    "head, blocks of 7": (Path("runs/tiny_markov_b7/adapter"), 7, (8,)),
}
RULES = ("official", "one group", "7 rows, placed", "15 rows, placed", "full (4 branches)", "full (8 branches)")


def measure(
    num_prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 64,
) -> None:
    """Decodes with every adapter that is there, and writes the tables."""
    prompts = heldout_prompts(DATASET, num_prompts, 48)
    models, heldout = {}, {}
    for name, (adapter, block_length, _) in ADAPTERS.items():
        if adapter.is_dir():
            models[name] = idlm_jax.load(BASE, adapter=adapter, dtype="float32")
            heldout[name] = heldout_means(models[name], DATASET, block_length=block_length, limit=26)
    rows: list[dict[str, Any]] = []
    plan = [
        (temperature, stride, name, rule, method)
        for temperature in (0.0, 1.0)
        for stride in (4, 8)
        for name in models
        if stride in ADAPTERS[name][2]
        for rule, method in rules(stride).items()
        if rule in RULES
    ]
    baseline: list[Completion] = []
    greedy: list[list[int]] | None = None
    for temperature, stride, name, rule, method in tqdm(plan, unit="rule"):
        params = [
            idlm_jax.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
            for seed in range(len(prompts))
        ]
        completions = idlm_jax.generate(models[name], prompts, method, params, batch_size=32)
        if (name, rule) == ("no head", "official"):
            baseline = completions
        if temperature == 0:
            if greedy is None:
                greedy = [each.token_ids for each in idlm_jax.generate(models[name], prompts, AR(), params)]
            if [each.token_ids for each in completions] != greedy:
                raise AssertionError(f"{name}, {method}: greedy tokens differ from AR's")
        found = summary(completions, method, baseline, seed=stride)
        rows.append({"temperature": temperature, "stride": stride, "adapter": name, "rule": rule, **found})
    record = {
        **provenance(f"python -m benchmarks.markov --num-prompts {len(prompts)} --max-tokens {max_tokens}"),
        "max_tokens": max_tokens,
        "heldout": heldout,
        "rows": rows,
    }
    write(RESULTS, "tiny-cpu", record, markdown(record))
    print(markdown(record))


def markdown(record: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        "# The Markov head",
        "",
        origin(record, "float32")
        + f" {record['max_tokens']} tokens per prompt; TPF counts the prefill; rows are query "
        "rows of decode forwards; intervals are 95 %, over prompts.",
        "",
        "Teacher-forced, on held-out rows, after the true token before each:",
        "",
        "| adapter | acceptance (T=1) | by depth | greedy acceptance | by depth | noisy loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, means in record["heldout"].items():
        cells = []
        for key in ("acceptance", "greedy_acceptance"):
            depths = [value for each, value in means.items() if each.startswith(f"{key}/depth_")]
            cells += [f"{means[key]:.3f}", " ".join(f"{value:.3f}" for value in depths)]
        lines.append(f"| {name} | {' | '.join(cells)} | {means['ce_noisy']:.3f} |")
    lines += [
        "",
        "Decoding; ratios are over the official rule with the adapter that has no head, at the same stride:",
        "",
        "| T | N | adapter | rule | TPF | over official, no head | rows a token | accepted by depth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        tpf, over, rows, depths = figures(row)
        if (row["adapter"], row["rule"]) == ("no head", "official"):
            over = ""
        cells = (f"{row['temperature']:g}", row["stride"], row["adapter"], row["rule"], tpf, over, rows, depths)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(measure)
