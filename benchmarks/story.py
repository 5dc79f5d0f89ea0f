"""Every system of the story on one base model: what is trained how, how fast it decodes, what its text is worth.

    python -m benchmarks.story run     # an hour on two cores; runs stay in runs/story: stop and start it
    python -m benchmarks.story report  # benchmarks/results/story/tiny-cpu.md from what `run` wrote

All conversions start from assets/tiny-qwen3-py, change every weight, and see the same rows in the same order. "NLL" is
what the base model, the one judge of all, thinks of a text: nats per token of the completions, prompts given.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from flax import nnx

import idlm_jax
from benchmarks.recipes import BASE, COMMON, CORPUS
from benchmarks.record import origin, provenance, write
from idlm_jax.cli.evaluate import heldout_means
from idlm_jax.decoding.generate import Completion
from idlm_jax.decoding.method import Method, method_name
from train.block_diffusion import measure_agreement
from train.config import config_from_mapping
from train.data import heldout_batches, heldout_prompts
from train.loop import run_training

RESULTS = Path("benchmarks/results/story")
NUM_PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 64, 48, 64
STRIDE = BLOCK = 4

ISD = {"block_length": STRIDE - 1}
BLOCKS = {"objective": "block_diffusion", "block_length": BLOCK, "eval_every": 0}


@dataclasses.dataclass(frozen=True)
class System:
    """One way to train, and the ways to decode what comes out.

    Attributes:
        changes: of the config that all runs share; None is the base itself.
        methods: of decoding.
        predicts_next: which token rows of block diffusion predict; None if it is none.
    """

    changes: dict[str, Any] | None
    methods: tuple[Method, ...]
    predicts_next: bool | None = None


def blocks(*, predicts_next: bool) -> tuple[Method, ...]:
    """Block diffusion from the most careful to the fastest, and with edits."""
    how = {"predicts_next": predicts_next}
    return (
        idlm_jax.BlockDiffusion(BLOCK, threshold=1.0, **how),
        idlm_jax.BlockDiffusion(BLOCK, threshold=0.9, **how),
        idlm_jax.BlockDiffusion(BLOCK, threshold=0.5, **how),
        idlm_jax.BlockDiffusion(BLOCK, threshold=0.5, edit_threshold=0.9, **how),
    )


DRAFTING: tuple[Method, ...] = (
    idlm_jax.ISD(STRIDE),
    idlm_jax.ISD(STRIDE, branches=STRIDE),
    idlm_jax.ISD(STRIDE, proposals="argmax", rule="official"),
    idlm_jax.TwoPass(STRIDE),
)
SYSTEMS: dict[str, System] = {
    "AR": System(None, (idlm_jax.AR(),)),
    "introspective, CE": System(ISD, (idlm_jax.AR(), *DRAFTING)),
    "introspective, CE + TV": System(ISD | {"tv_weight": 1.0}, (idlm_jax.AR(), *DRAFTING)),
    "block diffusion, own token": System(BLOCKS, blocks(predicts_next=False), False),
    "block diffusion, next token": System(BLOCKS | {"predicts_next": True}, blocks(predicts_next=True), True),
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    seeds: Annotated[str, typer.Option(help="Comma-separated; every system at each.")] = "0,1,2",
    again: Annotated[bool, typer.Option(help="Measure also what has a result.")] = False,
) -> None:
    """Trains and measures what has no result yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in map(int, seeds.split(",")):
        for name in SYSTEMS:
            path = _path(name, seed)
            if again or not path.exists():
                record = measure(name, seed)
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(f"{name}, seed {seed}: done", flush=True)
    report()


def measure(name: str, seed: int) -> dict[str, Any]:
    """One system at one seed: trained, measured on held-out rows, and decoded with."""
    system = SYSTEMS[name]
    base = idlm_jax.load(BASE, dtype="float32")
    lm = base
    if system.changes is not None:
        run_of = {"seed": seed, "run_name": _path(name, seed).stem, "output_dir": "runs/story"}
        exported = run_training(config_from_mapping(COMMON | system.changes | run_of)).export_dir
        assert exported is not None  # a run that is not stopped is exported
        lm = idlm_jax.load(exported, dtype="float32")
    prompts = heldout_prompts(Path(CORPUS), NUM_PROMPTS, PROMPT_TOKENS)
    rows = []
    for temperature in (0.0, 1.0):
        for method in system.methods:
            params = [
                idlm_jax.SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=index, ignore_eos=True)
                for index in range(len(prompts))
            ]
            completions = idlm_jax.generate(lm, prompts, method, params, batch_size=32)
            rows.append({"temperature": temperature, "method": method_name(method)} | costs(completions, method))
            rows[-1]["nll"] = judge(base, prompts, completions)
    record = provenance("python -m benchmarks.story run")
    return record | {"system": name, "seed": seed, "agreement": agreement(lm, system), "rows": rows}


def costs(completions: list[Completion], method: Method) -> dict[str, float]:
    """Tokens per forward, the prompt's included, and query rows of the others per token."""
    tokens, forwards = (
        sum(each) for each in zip(*((len(c.token_ids), c.num_forwards) for c in completions), strict=True)
    )
    rows = (forwards - len(completions)) * method.window_len
    return {"tokens_per_forward": tokens / forwards, "rows_per_token": rows / tokens}


def judge(base: idlm_jax.LanguageModel, prompts: list[list[int]], completions: list[Completion]) -> float:
    """Nats per token of the completions under the base model."""
    texts = np.array([[*prompt, *each.token_ids] for prompt, each in zip(prompts, completions, strict=True)], np.int32)

    def losses(tokens: np.ndarray) -> np.ndarray:
        logits = base.logits(tokens[:, :-1])
        return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    return float(np.mean([losses(part)[:, PROMPT_TOKENS - 1 :] for part in np.split(texts, 4)]))


def agreement(lm: idlm_jax.LanguageModel, system: System) -> dict[str, float] | None:
    """Expected acceptance at temperature 1 by depth on held-out rows; of the base there is none."""
    if system.changes is None:
        return None
    if system.predicts_next is None:
        found = heldout_means(lm, Path(CORPUS), block_length=STRIDE - 1, batch_size=8, limit=8)
    else:
        step = jax.jit(
            lambda params, batch: measure_agreement(
                nnx.merge(lm.graph, params), batch, BLOCK, predicts_next=bool(system.predicts_next)
            )
        )
        terms = [step(lm.params, batch) for batch in heldout_batches(Path(CORPUS), 8, 8)]
        total = jax.tree.map(lambda *each: sum(each[1:], each[0]), *terms)
        found = {key: float(term.mean) for key, term in total.items()}
    return {key: value for key, value in found.items() if key.startswith("acceptance")}


def _path(name: str, seed: int) -> Path:
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return RESULTS / f"{'_'.join(words)}-seed{seed}.json"


@app.command()
def report() -> None:
    """Writes the table."""
    found = {
        name: [json.loads(_path(name, s).read_text()) for s in range(9) if _path(name, s).exists()] for name in SYSTEMS
    }
    found = {name: group for name, group in found.items() if group}
    if not found:
        raise SystemExit(f"no results in {RESULTS}: `python -m benchmarks.story run` first")
    first = next(iter(found.values()))[0]
    write(RESULTS, "tiny-cpu", {**first, "systems": found}, markdown(first, found))


def markdown(first: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """The two tables."""
    tokens = COMMON["steps"] * COMMON["batch_size"] * 256
    lines = [
        f"# The story's systems: {BASE}",
        "",
        origin(first, "float32") + f" {tokens:,} training tokens each; means over seeds with lowest and highest. "
        f"{NUM_PROMPTS} held-out prompts by {MAX_TOKENS} tokens; TPF counts the prefill; rows are query rows of the "
        "other forwards.",
        "",
        "Acceptance, teacher-forced on held-out text: sum of min(p, q) of what is drafted (q) and what its check would "
        "say (p), by how far the token is from the last one known; for block diffusion, q hides its whole block and p "
        "knows what stands to its left. The token next to the known one needs no draft. A block of the kind that "
        "predicts the next token ends one place sooner.",
        "",
        "| trained | seeds | 2 ahead | 3 ahead | 4 ahead |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, group in found.items():
        if SYSTEMS[name].changes is None:
            continue
        # Its depth 0 is the token next to the known one, whose p is q.
        first_depth = 1 if SYSTEMS[name].predicts_next else 0
        depths = [f"acceptance/depth_{depth}" for depth in range(first_depth, STRIDE - 1)]
        columns = [_spread([record["agreement"][depth] for record in group]) for depth in depths]
        lines.append(f"| {name} | {len(group)} | " + " | ".join([*columns, "", ""][: STRIDE - 1]) + " |")
    lines += ["", "| T | trained | decoded | TPF | rows a token | NLL |", "| --- | --- | --- | --- | --- | --- |"]
    for temperature in (0.0, 1.0):
        for name, group in found.items():
            for index, row in enumerate(group[0]["rows"]):
                if row["temperature"] == temperature:
                    columns = [
                        _spread([record["rows"][index][key] for record in group])
                        for key in ("tokens_per_forward", "rows_per_token", "nll")
                    ]
                    lines.append(f"| {temperature:g} | {name} | {row['method']} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else f"{mean:.3f}"


if __name__ == "__main__":
    app()
