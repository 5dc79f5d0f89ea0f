"""Which recipe converts best: acceptance and tokens per forward against training tokens, on the tiny model.

    python -m benchmarks.recipes run     # hours on two cores; done runs are kept, so it can be stopped and started
    python -m benchmarks.recipes report  # docs/recipes.md and its plot, from what `run` wrote

Every recipe starts from assets/tiny-qwen3-py and sees the same rows in the same order, a seed apart.
"""

import json
import math
import platform
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

import idlm_jax
from idlm_jax.cli.evaluate import heldout_means
from idlm_jax.decoding.compare import compare_methods
from train.config import TrainConfig, config_from_mapping
from train.data import heldout_prompts
from train.loop import run_training
from train.metrics import read_metrics

BASE = "assets/tiny-qwen3-py"
RESULTS = Path("benchmarks/results/recipes")
BLOCK_LENGTH = 3
STRIDE = BLOCK_LENGTH + 1

COMMON: dict[str, Any] = {
    "objective": "introspective",
    "init_from": BASE,
    "dataset": {"path": "runs/data/stdlib_256_lora", "build": {"tokenizer": BASE, "max_seq_len": 256}},
    "block_length": BLOCK_LENGTH,
    "random_block_phase": True,
    "steps": 160,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.05,
    "save_every": 1000,
    "eval_every": 40,
    "eval_batches": 8,
    "log_every": 20,
}
LORA: dict[str, Any] = {"lora": {"rank": 64, "alpha": 64}, "learning_rate": 2e-3}
# Name -> what it changes. The first is plain CE_noisy + 0.2 CE_clean.
RECIPES: dict[str, dict[str, Any]] = {
    "ce": {},
    "ce, automatic alpha": {"auto_balance": True},
    "ce + kl": {"kl_weight": 1.0},
    "ce + tv": {"tv_weight": 1.0},
    "ce, curriculum 1-2-3": {"curriculum": [{"block_length": length} for length in (1, 2, 3)]},
    "lora, ce": LORA,
    "lora, ce + kl": {**LORA, "kl_weight": 1.0},
    "lora, ce + tv": {**LORA, "tv_weight": 1.0},
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated; every recipe at each.")] = "0,1,2",
    recipe: Annotated[list[str] | None, typer.Option(help="Only these; repeat for several.")] = None,
) -> None:
    """Trains and measures what has no result yet."""
    unknown = set(recipe or ()) - set(RECIPES)
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)} are none of {sorted(RECIPES)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    # Seeds outermost: whenever this is stopped, the recipes are about equally far.
    for seed in map(int, seeds.split(",")):
        for name in recipe or RECIPES:
            result = _result_path(name, seed)
            if not result.exists():
                record = measure(name, seed)
                result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(f"{name}, seed {seed}: {record['methods']}", flush=True)


def measure(name: str, seed: int) -> dict[str, Any]:
    """One run: the held-out curve, then ISD on held-out prompts, greedy and at temperature 1."""
    with tempfile.TemporaryDirectory() as folder:
        values = COMMON | RECIPES[name] | {"seed": seed, "run_name": "run", "output_dir": folder}
        config = config_from_mapping(values)
        exported = run_training(config).export_dir
        assert exported is not None  # a run that is not stopped is exported
        curve = [record for record in read_metrics(config.run_dir) if record["kind"] == "eval"]
        lm = _load(BASE, adapter=exported) if config.lora else _load(exported)
        shutil.rmtree(config.run_dir / "checkpoints")
        dataset = Path(config.dataset.path)
        prompts = heldout_prompts(dataset, 32, 48)
        methods = {}
        for temperature in (0.0, 1.0):
            params = [
                idlm_jax.SamplingParams(max_tokens=64, temperature=temperature, seed=index, ignore_eos=True)
                for index in range(len(prompts))
            ]
            ar, isd = compare_methods(lm, prompts, [idlm_jax.ISD(stride=STRIDE)], params, batch_size=32, rounds=1)
            if temperature == 0.0 and isd.num_identical != len(prompts):
                raise AssertionError(f"{name}, seed {seed}: greedy ISD differs from AR")
            methods[f"temperature_{temperature:g}"] = {
                "tokens_per_forward_ar": ar.tokens_per_forward,
                "tokens_per_forward": isd.tokens_per_forward,
                "acceptance_rate": isd.acceptance_rate,
            }
        return {
            "recipe": name,
            "seed": seed,
            "changes": RECIPES[name],
            "tokens_per_step": config.batch_size * 256,
            "before": _before(dataset, config),
            "curve": curve,
            "methods": methods,
            "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
        }


def _before(dataset: Path, config: TrainConfig) -> dict[str, float]:
    """The same held-out measures of the base, on the rows that the run's evaluations read."""
    return heldout_means(
        _load(BASE),
        dataset,
        block_length=BLOCK_LENGTH,
        batch_size=config.batch_size,
        limit=config.eval_batches,
    )


def _load(model: str | Path, adapter: Path | None = None) -> idlm_jax.LanguageModel:
    # Not the default bfloat16, in which greedy ISD and AR may part at a tie (docs/numerics.md).
    return idlm_jax.load(model, dtype="float32", adapter=adapter)


def implied_tokens_per_forward(record: dict[str, float]) -> float:
    """1 + a1 + a1 a2 + ...: tokens per forward if acceptances by depth were independent."""
    rates = [record[f"acceptance/depth_{depth}"] for depth in range(BLOCK_LENGTH)]
    return 1 + sum(math.prod(rates[: depth + 1]) for depth in range(BLOCK_LENGTH))


def _result_path(name: str, seed: int) -> Path:
    slug = "_".join("".join(c if c.isalnum() else " " for c in name).split())
    return RESULTS / f"{slug}-seed{seed}.json"


def _results() -> dict[str, list[dict[str, Any]]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return {name: [record for record in found if record["recipe"] == name] for name in RECIPES}


@app.command()
def report() -> None:
    """Writes the table and the plot."""
    results = {name: records for name, records in _results().items() if records}
    if not results:
        raise SystemExit(f"no results in {RESULTS}: `python -m benchmarks.recipes run` first")
    Path("docs/recipes.md").write_text(_page(results), encoding="utf-8")
    _plot(results, Path("docs/images/recipes.png"))


def _page(results: dict[str, list[dict[str, Any]]]) -> str:
    records = [record for group in results.values() for record in group]
    tokens = COMMON["steps"] * records[0]["tokens_per_step"]
    before = records[0]["before"]
    lines = [
        "# Which recipe converts best",
        "",
        f"`assets/tiny-qwen3-py` (3M parameters), {tokens:,} training tokens each ({COMMON['steps']} steps of "
        f"{COMMON['batch_size']} x 256), block length {BLOCK_LENGTH}, decoded at stride {STRIDE}; mean over seeds with "
        "the spread from lowest to highest. Acceptance is exact, sum of min(p, q) at held-out MASK rows after true "
        "prefixes; tokens per forward (TPF) are counted while decoding 32 held-out prompts by 64 tokens, prefills "
        "included. `ce_clean` is next-token loss: what the conversion costs the model as an AR one "
        f"({before['ce_clean']:.3f} before). With an adapter it cannot move: the clean stream is the base.",
        "",
        "| recipe | seeds | acceptance | by depth | TPF, T=0 | TPF, T=1 | ce_clean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in results.items():
        last = [record["curve"][-1] for record in group]
        depths = " ".join(
            f"{statistics.mean(point[f'acceptance/depth_{depth}'] for point in last):.3f}"
            for depth in range(BLOCK_LENGTH)
        )
        columns = [
            name,
            str(len(group)),
            _spread([point["acceptance"] for point in last]),
            depths,
            _spread([record["methods"]["temperature_0"]["tokens_per_forward"] for record in group]),
            _spread([record["methods"]["temperature_1"]["tokens_per_forward"] for record in group]),
            _spread([point["ce_clean"] for point in last]),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    dates = sorted({record["date"] for record in records})
    versions = records[0]["versions"]
    lines += [
        "",
        "![held-out acceptance and implied tokens per forward against training tokens](images/recipes.png)",
        "",
        f"Measured {dates[0]} to {dates[-1]} on CPU, float32, Python {versions['python']}, jax {versions['jax']}, by "
        "`python -m benchmarks.recipes run`; this page is written by `python -m benchmarks.recipes report` from "
        "`benchmarks/results/recipes/`.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else f"{mean:.3f}"


def _plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, group in results.items():
        style = "--" if "lora" in RECIPES[name] else "-"
        curves = [[record["before"], *record["curve"]] for record in group]
        tokens = [0, *(point["step"] * group[0]["tokens_per_step"] for point in group[0]["curve"])]
        for axis, measure_point in ((left, lambda point: point["acceptance"]), (right, implied_tokens_per_forward)):
            means = [statistics.mean(map(measure_point, points)) for points in zip(*curves, strict=True)]
            axis.plot(tokens, means, style, marker="o", markersize=3, label=name)
    left.set(title="held-out acceptance", xlabel="training tokens", ylabel="sum of min(p, q)")
    right.set(title=f"implied tokens per forward, stride {STRIDE}", xlabel="training tokens")
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    app()
