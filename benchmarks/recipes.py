"""Which recipe converts best: acceptance and tokens per forward against training tokens, on the tiny model.

    python -m benchmarks.recipes run     # hours on two cores; runs stay in runs/recipes: stop and start it
    python -m benchmarks.recipes report  # docs/recipes.md and its plot, from what `run` wrote

Every recipe starts from assets/tiny-qwen3-py and sees the same rows in the same order, a seed apart; those on the
model's own text see as many rows of that, which the first run writes.
"""

import json
import math
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

import idlm_jax
from benchmarks.drafts import fewer_forwards, mean_interval, measure_drafts, with_interval
from idlm_jax.cli.evaluate import heldout_means
from idlm_jax.decoding.method import AR, ISD
from train.config import config_from_mapping
from train.data import DatasetSettings, build_dataset, heldout_prompts
from train.data.continuations import ContinueSettings, continue_documents
from train.loop import run_training
from train.metrics import read_metrics

BASE = "assets/tiny-qwen3-py"
RESULTS = Path("benchmarks/results/recipes")
RUNS = Path("runs/recipes")
BLOCK_LENGTH = 3
STRIDE = BLOCK_LENGTH + 1
CORPUS = "runs/data/stdlib_256_lora"
# The rows of a run, 160 x 8, and those that packing holds out.
NUM_OWN_DOCUMENTS = 1360
NUM_PROMPTS = 64
REFERENCE = "lora, ce + tv"

COMMON: dict[str, Any] = {
    "objective": "introspective",
    "init_from": BASE,
    "dataset": {"path": CORPUS, "build": {"tokenizer": BASE, "max_seq_len": 256}},
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


def own_text(temperature: float) -> dict[str, Any]:
    """Rows of what the base says itself, behind the first tokens of the corpus's documents."""
    path = f"runs/data/own_text_t{temperature:g}"
    return {"path": path, "build": {"roots": [f"{path}.jsonl"], "tokenizer": BASE, "max_seq_len": 256}}


LORA: dict[str, Any] = {"lora": {"rank": 64, "alpha": 64}, "learning_rate": 2e-3}
# Evaluated once, at the end: on the way it would be on another text than the other recipes.
OWN: dict[str, Any] = {"eval_every": 0}
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
    "lora, ce, own text": {**LORA, **OWN, "dataset": own_text(1.0)},
    "lora, ce + tv, own text": {**LORA, **OWN, "tv_weight": 1.0, "dataset": own_text(1.0)},
    "lora, ce + tv, own greedy text": {**LORA, **OWN, "tv_weight": 1.0, "dataset": own_text(0.0)},
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated; every recipe at each.")] = "0,1,2",
    recipe: Annotated[list[str] | None, typer.Option(help="Only these; repeat for several.")] = None,
    again: Annotated[bool, typer.Option(help="Measure also what has a result.")] = False,
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
            if again or not result.exists():
                record = measure(name, seed)
                result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(f"{name}, seed {seed}: {record['methods']}", flush=True)


def write_own_text(temperature: float) -> None:
    """Lets the base continue the corpus's documents, and packs that; what is there is kept."""
    build_dataset(DatasetSettings(tokenizer=BASE, max_seq_len=256), CORPUS)
    dataset = own_text(temperature)
    (jsonl,) = dataset["build"]["roots"]
    # ISD is exact and AR draws from the same distribution, on a CPU, where rows cost time, in a fifth of it.
    continue_documents(
        Path(CORPUS),
        Path(jsonl),
        ContinueSettings(model=BASE, temperature=temperature),
        lm=_load(BASE),
        method=AR(),
        limit=NUM_OWN_DOCUMENTS,
        show_progress=True,
    )
    build_dataset(DatasetSettings(roots=(jsonl,), tokenizer=BASE, max_seq_len=256), dataset["path"])


def measure(name: str, seed: int) -> dict[str, Any]:
    """One run: the held-out curve, then ISD on held-out prompts, greedy and at temperature 1."""
    values = COMMON | RECIPES[name] | {"seed": seed, "run_name": _slug(name, seed), "output_dir": str(RUNS)}
    config = config_from_mapping(values)
    for temperature in (1.0, 0.0):  # the first is measured on by every recipe
        if temperature or values["dataset"] == own_text(temperature):
            write_own_text(temperature)
    exported = run_training(config).export_dir
    assert exported is not None  # a run that is not stopped is exported
    curve = [record for record in read_metrics(config.run_dir) if record["kind"] == "eval"]
    lm = _load(BASE, adapter=exported) if config.lora else _load(exported)
    prompts = heldout_prompts(Path(CORPUS), NUM_PROMPTS, 48)
    methods = {}
    for temperature in (0.0, 1.0):
        few = prompts[::2]
        params = [
            idlm_jax.SamplingParams(max_tokens=64, temperature=temperature, seed=index, ignore_eos=True)
            for index in range(len(few))
        ]
        completions = idlm_jax.generate(lm, few, ISD(stride=STRIDE), params, batch_size=32)
        tokens = [each.token_ids for each in completions]
        if temperature == 0.0 and tokens != [each.token_ids for each in idlm_jax.generate(lm, few, AR(), params)]:
            raise AssertionError(f"{name}, seed {seed}: greedy ISD differs from AR")
        rate = sum(map(len, tokens)) / sum(each.num_forwards for each in completions)
        methods[f"temperature_{temperature:g}"] = {"tokens_per_forward": rate}
    return {
        "recipe": name,
        "seed": seed,
        "changes": RECIPES[name],
        "tokens_per_step": config.batch_size * 256,
        "before": _heldout(_load(BASE), CORPUS),
        "curve": curve,
        "heldout": _heldout(lm, CORPUS),
        "heldout_own_text": _heldout(lm, own_text(1.0)["path"]),
        "methods": methods,
        "drafts": measure_drafts(lm, prompts, [ISD(STRIDE, branches=branches) for branches in (1, 2, STRIDE)]),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def _heldout(lm: idlm_jax.LanguageModel, dataset: str) -> dict[str, float]:
    """Teacher-forced measures, on the rows that a run's evaluations read."""
    return heldout_means(
        lm, Path(dataset), block_length=BLOCK_LENGTH, batch_size=COMMON["batch_size"], limit=COMMON["eval_batches"]
    )


def _load(model: str | Path, adapter: Path | None = None) -> idlm_jax.LanguageModel:
    # Not the default bfloat16, in which greedy ISD and AR may part at a tie (docs/numerics.md).
    return idlm_jax.load(model, dtype="float32", adapter=adapter)


def implied_tokens_per_forward(record: dict[str, float]) -> float:
    """1 + a1 + a1 a2 + ...: tokens per forward if acceptances by depth were independent."""
    rates = [record[f"acceptance/depth_{depth}"] for depth in range(BLOCK_LENGTH)]
    return 1 + sum(math.prod(rates[: depth + 1]) for depth in range(BLOCK_LENGTH))


def _slug(name: str, seed: int) -> str:
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return f"{'_'.join(words)}-seed{seed}"


def _result_path(name: str, seed: int) -> Path:
    return RESULTS / f"{_slug(name, seed)}.json"


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
        "prefixes of the corpus; tokens per forward (TPF) are counted while decoding 32 held-out prompts by 64 tokens, "
        "prefills included. `ce_clean` is next-token loss: what the conversion costs the model as an AR one "
        f"({before['ce_clean']:.3f} before). With an adapter it cannot move: the clean stream is the base.",
        "",
        "| recipe | seeds | acceptance | by depth | TPF, T=0 | TPF, T=1 | ce_clean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in results.items():
        last = [_last(record) for record in group]
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
        *_decoding_tables(results),
        "",
        f"Measured {dates[0]} to {dates[-1]} on CPU, float32, Python {versions['python']}, jax {versions['jax']}, by "
        "`python -m benchmarks.recipes run`; this page is written by `python -m benchmarks.recipes report` from "
        "`benchmarks/results/recipes/`.",
    ]
    return "\n".join(lines) + "\n"


def _decoding_tables(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What decoding sees of the recipes whose drafts were told apart."""
    watched = {name: [each for each in group if "drafts" in each] for name, group in results.items()}
    watched = {name: group for name, group in watched.items() if group}
    if REFERENCE not in watched:
        return []
    lines = [
        "",
        "## What decoding sees",
        "",
        "Own text: the base's own continuations at temperature 1 (greedy: at 0) of the first 32 tokens of the corpus's "
        "training documents, 224 tokens each, the only part that is masked and scored: seven eighths; `idlm continue` "
        f"writes it, and as many rows of it are trained on. TPF here is over {NUM_PROMPTS} "
        "held-out prompts by 64 tokens, with one group of MASKs and with two placed ones (whole "
        "groups, as they were placed until 2026-11-27); in brackets the ratio to "
        f'"{REFERENCE}" at the same seeds. Acceptance is the mean of min(1, p/q) over the drafts that decoding '
        "verified (one group, T=1), and, teacher-forced, the sum of min(p, q) on own text that was held out. Intervals "
        "are 95 %, over prompts; those of several seeds, which share the prompts, are averaged.",
        "",
        "| recipe | seeds | acceptance, own text | decoding | TPF, T=0 | 2 branches | TPF, T=1 | 2 branches |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in watched.items():
        pairs = [(each, other) for each in group for other in watched[REFERENCE] if other["seed"] == each["seed"]]
        decoding = mean_interval([_drafts(each, 1.0, 1)["acceptance"] for each in group])
        columns = [
            name,
            str(len(group)),
            _spread([each["heldout_own_text"]["acceptance"] for each in group]),
            with_interval(decoding),
        ]
        for temperature in (0.0, 1.0):
            for branches in (1, 2):
                rates = [_drafts(each, temperature, branches)["tokens_per_forward"] for each in group]
                ratios = [
                    fewer_forwards(_drafts(each, temperature, branches), _drafts(other, temperature, branches))
                    for each, other in pairs
                ]
                compared = "" if name == REFERENCE else f" [{with_interval(mean_interval(ratios))}]" if ratios else ""
                columns.append(f"{statistics.mean(rate['mean'] for rate in rates):.3f}{compared}")
        lines.append("| " + " | ".join(columns) + " |")
    lines += [
        "",
        f"Acceptance by depth while decoding at T=1 with a group behind every prefix ({STRIDE} branches), by what "
        "stands between the group's prefix and its drafts, unseen: the bonus token of a forward that accepted all "
        "drafts, or the correction of a refused one.",
        "",
        "| recipe | behind a bonus, depth 1 | 2 | 3 | behind a correction, depth 1 | 2 | 3 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in watched.items():
        kinds = [_drafts(each, 1.0, STRIDE)["by_kind"] for each in group]
        columns = [
            with_interval(mean_interval([kind[which][depth] for kind in kinds]))
            for which in ("bonus", "correction")
            for depth in range(BLOCK_LENGTH)
        ]
        lines.append("| " + " | ".join([name, *columns]) + " |")
    return lines


def _drafts(record: dict[str, Any], temperature: float, branches: int) -> dict[str, Any]:
    rows = (row for row in record["drafts"] if (row["temperature"], row["branches"]) == (temperature, branches))
    return next(rows)


def _last(record: dict[str, Any]) -> dict[str, float]:
    """The measures at the end of a run on held-out rows of the corpus, whatever it was trained on."""
    return record["heldout"] if "dataset" in record["changes"] else record["curve"][-1]


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else f"{mean:.3f}"


def _plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, group in results.items():
        if "dataset" in RECIPES[name]:
            continue  # evaluated on the way, it would be on another text
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
