"""A model that means something: a parent trained from nothing on this machine's Python packages, and its conversions.

Every run trains for its share of the time: a few steps are timed first, and the number of steps, which the schedule of
rates needs to know, follows from them. Runs and dataset stay in `runs/device`; the same command goes on where it was
stopped.
"""

import dataclasses
import json
import shutil
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import idlm_jax
from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.compiling import describe
from idlm_jax.decoding.method import AR, ISD, Method, method_name
from train.config import TrainConfig, config_from_mapping, load_config
from train.data import heldout_prompts
from train.loop import run_training

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "device"
# Much Python that is the same everywhere; those that are not installed are left out.
PACKAGES = (
    *("flax", "jax", "lightning", "matplotlib", "networkx", "numba", "numpy", "optax", "pandas", "peft", "scipy"),
    *("skimage", "sklearn", "statsmodels", "sympy", "timm", "torch", "torchvision", "transformers", "xarray"),
)
TIMED_STEPS = 30
# Compiling a step twice, the last evaluation, the export; and loading, compiling and running one method.
AROUND_S, A_METHOD_S = 60.0, 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertCase:
    """One training run.

    Attributes:
        name: of the run.
        seconds: of training steps.
        changes: keys of the config beside `_common`.
        methods: to decode its result with.
        is_dry: steps and prompts are a handful.
    """

    name: str
    seconds: float
    changes: dict[str, Any]
    methods: tuple[Method, ...] = ()
    is_dry: bool = False


STRIDES = (ISD(4), ISD(4, rows=7), ISD(4, branches=4), ISD(8), ISD(8, rows=15), ISD(8, branches=8))
PARENT = {"objective": "ar", "learning_rate": 1e-3, "weight_decay": 0.1}
MODEL_60M = {"vocab_size": 16384, "hidden_size": 640, "num_layers": 10, "num_heads": 10, "num_kv_heads": 5}
MODEL_60M |= {"head_dim": 64, "mlp_size": 1792}
ADAPTER = {"lora": {"rank": 128, "alpha": 128}, "learning_rate": 1e-3}
# What the paper does: cross-entropy alone, block lengths in stages, the automatic alpha in the last.
PAPER = {"curriculum": [{"block_length": 1}, {"block_length": 2}, {"block_length": 3, "auto_balance": True}]}
OURS = {"tv_weight": 1.0, "markov_rank": 128}
# The most telling first.
CASES = (
    ConvertCase(name="parent", seconds=150.0, changes=PARENT | {"model": MODEL_60M}),
    ConvertCase(name="adapter_ours", seconds=60.0, changes=ADAPTER | OURS, methods=STRIDES),
    ConvertCase(name="adapter_ce", seconds=60.0, changes=ADAPTER, methods=STRIDES),
    ConvertCase(name="full_ours", seconds=60.0, changes={"learning_rate": 5e-4} | OURS, methods=STRIDES),
    ConvertCase(name="full_paper", seconds=60.0, changes={"learning_rate": 5e-4} | PAPER, methods=STRIDES),
)
MODEL_DRY = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
MODEL_DRY |= {"head_dim": 8, "mlp_size": 24}
DRY = (
    ConvertCase(name="parent", seconds=0.0, changes=PARENT | {"model": MODEL_DRY}, is_dry=True),
    ConvertCase(
        name="adapter_ours",
        seconds=0.0,
        changes={"lora": {"rank": 2, "alpha": 2}, "tv_weight": 1.0, "markov_rank": 2},
        methods=(ISD(2),),
        is_dry=True,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of a case.

    Attributes:
        case: its name.
        steps: of training.
        ms_per_step: as timed before it.
        tokens: of the rows trained on.
        heldout: the last evaluation: losses, acceptance, both by depth.
        tokens_per_forward: of each method and temperature; greedy ones also say how many prompts differ from AR.
        note: why there is no more.
    """

    case: str
    steps: int = 0
    ms_per_step: float | None = None
    tokens: int = 0
    heldout: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens_per_forward: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""


def convert(cases: Sequence[ConvertCase], folder: Path, budget: Budget) -> Iterator[list[Conversion]]:
    """Trains and measures case after case, and yields what there is after each; curves are copied into `folder`."""
    if cases[0].is_dry:
        shutil.rmtree(_runs(cases[0]), ignore_errors=True)
    done: list[Conversion] = []
    for case in cases:
        line = Conversion(case=case.name, note=SKIPPED)
        if budget.allows(case.seconds + AROUND_S):
            try:
                line = trained = _train(case, budget)
                shutil.copy(_folder(case) / "metrics.jsonl", folder / f"convert_{case.name}.jsonl")
                for line in _decode(case, trained, budget):
                    yield [*done, line]
            except Exception as error:  # a kernel's refusal, a loss that diverged: the next case may still run
                line = dataclasses.replace(line, note=describe(error))
        done.append(line)
        yield list(done)


def _train(case: ConvertCase, budget: Budget) -> Conversion:
    if (_folder(case) / "config.yaml").exists():  # go on with its number of steps
        config = load_config(_folder(case) / "config.yaml")
        ms_per_step = None
    else:
        ms_per_step = _ms_per_step(case)
        config = _config(case, steps=3 if case.is_dry else max(20, round(case.seconds * 1e3 / ms_per_step)))
    result = run_training(config, should_stop=lambda: not budget.allows(AROUND_S / 2))
    records = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if record["kind"] == "eval"]
    last = evaluations[-1] if evaluations else {}
    row_len = config.dataset.build.max_seq_len if config.dataset.build else 0
    return Conversion(
        case=case.name,
        steps=result.step,
        ms_per_step=None if case.is_dry else ms_per_step,
        tokens=result.step * config.batch_size * row_len,
        heldout={name: value for name, value in last.items() if isinstance(value, float)},
        note="" if result.is_finished else f"{SKIPPED}: {result.step} of {config.steps} steps",
    )


def _ms_per_step(case: ConvertCase) -> float:
    """The median time of a step once the first are over."""
    config = _config(case, steps=3 if case.is_dry else TIMED_STEPS, run_name=f"{case.name}_timed", eval_batches=0)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    ends: list[float] = []
    run_training(config, on_step=lambda step, metrics: ends.append(time.perf_counter()), echo=lambda line: None)
    return 1e3 * statistics.median(
        b - a for a, b in zip(ends[len(ends) // 3 :], ends[len(ends) // 3 + 1 :], strict=False)
    )


def _decode(case: ConvertCase, line: Conversion, budget: Budget) -> Iterator[Conversion]:
    """The line with one method and temperature after the other."""
    if not case.methods or line.note:
        return
    config = _config(case, steps=1)
    if config.lora:
        assert config.init_from is not None  # `_config` gives every case but the parent one
        lm = idlm_jax.load(config.init_from, adapter=config.run_dir / "adapter")
    else:
        lm = idlm_jax.load(config.run_dir / "hf")
    num_prompts, max_tokens = (2, 4) if case.is_dry else (128, 96)
    prompts = heldout_prompts(config.dataset.path, num_prompts, 16 if case.is_dry else 48)
    for temperature in (0.0, 1.0):
        params = [
            idlm_jax.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
            for seed in range(len(prompts))
        ]
        if not budget.allows(2 * A_METHOD_S):
            yield dataclasses.replace(line, note=SKIPPED)
            return
        ar = [each.token_ids for each in idlm_jax.generate(lm, prompts, AR(), params, batch_size=64)]
        for method in case.methods:
            if not budget.allows(A_METHOD_S):
                yield dataclasses.replace(line, note=SKIPPED)
                return
            found = idlm_jax.generate(lm, prompts, method, params, batch_size=64)
            name = f"{method_name(method)}, T={temperature:g}"
            rate = sum(len(each.token_ids) for each in found) / sum(each.num_forwards for each in found)
            line.tokens_per_forward[name] = rate
            if temperature == 0:
                differ = sum(each.token_ids != tokens for each, tokens in zip(found, ar, strict=True))
                line.tokens_per_forward[f"{name}: prompts unlike AR"] = differ
            yield line


def _config(case: ConvertCase, *, steps: int, **changes: Any) -> TrainConfig:
    is_parent = "model" in case.changes
    start = {} if is_parent else {"init_from": str(_runs(case) / "parent" / "hf"), "random_block_phase": True}
    return config_from_mapping(_common(case) | start | case.changes | {"run_name": case.name, "steps": steps} | changes)


def _common(case: ConvertCase) -> dict[str, Any]:
    library = Path(sysconfig.get_paths()["purelib"])
    roots = [ROOT / "idlm_jax"] if case.is_dry else [path for name in PACKAGES if (path := library / name).is_dir()]
    vocab_size, row_len = (300, 64) if case.is_dry else (MODEL_60M["vocab_size"], 1024)
    build = {"roots": [str(root) for root in roots], "vocab_size": vocab_size, "max_seq_len": row_len}
    return {
        "output_dir": str(_runs(case)),
        "dataset": {"path": str(_runs(case) / "data"), "build": build},
        "block_length": 3,
        "batch_size": 2 if case.is_dry else 64,
        "warmup_ratio": 0.05,
        "compute_dtype": "bfloat16",
        "save_every": 10**6,  # the last step alone
        "eval_every": 0,
        "eval_batches": 2 if case.is_dry else 16,
        "log_every": 1 if case.is_dry else 20,
    }


def _runs(case: ConvertCase) -> Path:
    return RUNS / "dry" if case.is_dry else RUNS


def _folder(case: ConvertCase) -> Path:
    return _runs(case) / case.name
