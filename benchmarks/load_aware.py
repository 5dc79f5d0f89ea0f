"""Does "auto" keep up with the best fixed method at every load? Tokens a second of the engine, by callers at once.

python -m benchmarks.load_aware    # on two idle cores, half an hour -> benchmarks/results/load_aware/

One compiled device serves every method of the menu: "fixed" always chooses the same, "auto" as the server does, so that
nothing differs but the choice. AR compiled by itself, without room for drafts, stands beside them. Callers wait for
their answer and ask again. Completions differ in length, as they do in earnest: where all are as long, AR keeps the
requests in step, and its batches full, as no method does whose tokens come in uneven portions (`--spread 0` shows it).
Methods take turns within a round, and rounds turn the order; ratios are taken in rounds. What else the machine does
only slows a run down, so the fastest run of "auto" over the fastest of the best fixed method stands beside them.
Fixed methods that are far behind after a few rounds are not run in the others.
"""

import queue
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import binom
from tqdm import tqdm

import idlm_jax
from benchmarks.record import origin, provenance, write
from idlm_jax.decoding.method import Method, method_name
from idlm_jax.decoding.pacing import Pacer
from serve.config import EngineConfig
from serve.device import Device
from serve.engine import Engine
from train.data import heldout_prompts

RESULTS = Path("benchmarks/results/load_aware")
AUTO, AR_ALONE = "auto", "AR, compiled alone"
# After so many rounds, fixed methods slower than this against AR are out.
TRIAL_ROUNDS, FAR_BEHIND = 3, 0.85
PROMPT_LEN, MAX_LEN = 48, 192


def num_requests(callers: int) -> int:
    """Of one run: three for each caller, so that most of the time all of them wait for an answer."""
    return max(32, 3 * callers)


class Fixed(Pacer):
    """Always the same method."""

    def __init__(self, menu: Sequence[Method], index: int):
        super().__init__(menu)
        self._index = index

    def choose(self, batch: int, forwards: int = 1) -> int:
        return self._index

    def follow_seconds(self, batch: int, index: int, seconds: float) -> None:
        """Nothing follows from it."""


def run(engine: Engine, requests: Sequence[tuple[list[int], idlm_jax.SamplingParams]], callers: int) -> float:
    """Tokens a second, from the first request to the last answer."""
    ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
    waiting = list(reversed(requests))
    start = time.perf_counter()

    def ask() -> None:
        engine.submit(
            *waiting.pop(), deliver=lambda piece: ended.put(True) if piece.finish_reason is not None else None
        )

    for _ in range(min(callers, len(waiting))):
        ask()
    for _ in range(len(requests)):
        ended.get()
        if waiting:
            ask()
    return engine.stats().num_committed / (time.perf_counter() - start)


def measure(
    model: Annotated[str, typer.Option(help="Hugging Face folder.")] = "assets/tiny-qwen3-py",
    adapter: Annotated[Path, typer.Option(help="Gated adapter.")] = Path("assets/tiny-qwen3-py-isd"),
    dataset: Annotated[Path, typer.Option(help="With held-out prompts.")] = Path("runs/data/stdlib_256_lora"),
    callers: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,4,8,16,32,64",
    max_stride: Annotated[int, typer.Option()] = 4,
    max_tokens: Annotated[int, typer.Option(help="Of a completion, on average.")] = 64,
    spread: Annotated[float, typer.Option(help="Lengths are within this share of it, evenly.", min=0, max=1)] = 0.75,
    temperature: Annotated[float, typer.Option()] = 0.0,
    rounds: Annotated[int, typer.Option(help="Counted; one to warm up comes first.", min=3)] = 11,
    name: Annotated[str, typer.Option(help="Of the result files.")] = "tiny-cpu",
) -> None:
    """Measures every method at every load, and writes the tables."""
    points = [int(each) for each in callers.split(",")]
    lm = idlm_jax.load(model, adapter=adapter, dtype="float32")
    config = EngineConfig(
        method=idlm_jax.ISD(stride="auto", branches="auto", max_stride=max_stride),
        max_running=max(points),
        num_pages=max(points) * 4 + 1,
        max_len=MAX_LEN,
        prefill_shapes=((1, 64), (4, 64)),
        caches_prefixes=False,
    )
    alone = EngineConfig(**{**vars(config), "method": idlm_jax.AR()})
    with tqdm(unit="program", desc="compiling") as bar:

        def show(done: int, total: int, program: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        device, ar_device = Device(lm, config, show), Device(lm, alone)
    assert device.pacer is not None
    menu = config.method.menu
    pacers: dict[str, Pacer | None] = {method_name(method): Fixed(menu, index) for index, method in enumerate(menu)}
    pacers |= {AUTO: device.pacer, AR_ALONE: None}
    names = list(pacers)
    timed = {batch: device.pacer.seconds(batch) for batch in config.decode_buckets}
    record: dict[str, Any] = {
        **provenance(
            f"python -m benchmarks.load_aware --callers {callers} --max-stride {max_stride} --max-tokens "
            f"{max_tokens} --spread {spread:g} --temperature {temperature:g} --rounds {rounds} --name {name}"
        ),
        "model": model,
        "adapter": str(adapter),
        "step_seconds": {
            batch: {names[index]: each for index, each in seconds.items()} for batch, seconds in timed.items()
        },
        "points": [],
    }
    every = heldout_prompts(dataset, num_requests(max(points)), PROMPT_LEN)
    lengths = np.random.default_rng(0).uniform(1 - spread, 1 + spread, len(every)) * max_tokens
    requests = [
        (prompt, idlm_jax.SamplingParams(max_tokens=max(1, round(length)), temperature=temperature, ignore_eos=True))
        for prompt, length in zip(every, lengths.tolist(), strict=True)
    ]
    for count in tqdm(points, unit="load"):
        speeds = np.full((rounds, len(names)), np.nan)
        chosen: dict[str, int] = {}
        for turn in range(-1, rounds):
            for column in np.roll(range(len(names)), -turn):
                which = names[column]
                if turn >= TRIAL_ROUNDS and which not in (AUTO, AR_ALONE):
                    before = speeds[:TRIAL_ROUNDS]
                    if np.median(before[:, column] / before[:, 0]) < FAR_BEHIND:
                        continue
                compiled, wanted = (ar_device, alone) if which == AR_ALONE else (device, config)
                compiled.reset()
                with Engine(lm, wanted, device=compiled, pacer=pacers[which]) as engine:
                    speed = run(engine, requests[: num_requests(count)], count)
                    steps = engine.stats().num_decode_forwards_by_method
                if turn >= 0:
                    speeds[turn, column] = speed
                    if which == AUTO:
                        chosen = {method: chosen.get(method, 0) + number for method, number in steps.items()}
        record["points"].append(point(count, names, speeds, chosen))
        write(RESULTS, name, record, markdown(record))
    print(markdown(record))


def point(callers: int, names: list[str], speeds: np.ndarray, chosen: dict[str, int]) -> dict[str, Any]:
    """What one load gave: medians and ranges of ratios within rounds."""

    def ratio(column: int, to: int) -> dict[str, float]:
        ratios = speeds[:, column] / speeds[:, to]
        ratios = np.sort(ratios[~np.isnan(ratios)])
        # Of the median, from order statistics: 95 % and more from 6 rounds on (binomial), all of them below.
        cut = binom.ppf(0.025, len(ratios), 0.5)
        low, high = (int(cut) - 1, len(ratios) - int(cut)) if cut >= 1 else (0, len(ratios) - 1)
        return {"median": float(np.median(ratios)), "low": float(ratios[low]), "high": float(ratios[high])}

    fixed = [column for column, name in enumerate(names) if name not in (AUTO, AR_ALONE)]
    best = max(fixed, key=lambda column: float(np.nanmedian(speeds[:, column] / speeds[:, 0])))
    auto = names.index(AUTO)
    return {
        "callers": callers,
        "over_ar": {name: ratio(column, 0) for column, name in enumerate(names)},
        "best_fixed": names[best],
        "auto_over_best_fixed": ratio(auto, best),
        "auto_over_best_fixed_fastest": float(np.nanmax(speeds[:, auto]) / np.nanmax(speeds[:, best])),
        "auto_over_ar_alone": ratio(auto, names.index(AR_ALONE)),
        "chosen": chosen,
        "tokens_per_s": {
            name: speeds[~np.isnan(speeds[:, column]), column].tolist() for column, name in enumerate(names)
        },
    }


def markdown(record: dict[str, Any]) -> str:
    """The two tables."""

    def cell(ratio: dict[str, float]) -> str:
        return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"

    names = list(record["points"][0]["over_ar"])[1:]
    lines = [
        f"# Load-aware stride: {record['model']}",
        "",
        origin(record, "float32") + " Tokens a second of the engine over AR in the same "
        "round; median of rounds with its 95 % interval (all rounds, where there are fewer than 6).",
        "",
        "| callers | " + " | ".join(names) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for each in record["points"]:
        lines.append(f"| {each['callers']} | " + " | ".join(cell(each["over_ar"][name]) for name in names) + " |")
    lines += [
        "",
        "| callers | best fixed | auto over it | fastest runs | auto over AR compiled alone | what auto chose |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in record["points"]:
        total = sum(each["chosen"].values())
        shares = sorted(each["chosen"].items(), key=lambda item: -item[1])
        chosen = ", ".join(f"{name} {number / total:.0%}" for name, number in shares if number >= 0.005 * total)
        lines.append(
            f"| {each['callers']} | {each['best_fixed']} | {cell(each['auto_over_best_fixed'])} | "
            f"{each['auto_over_best_fixed_fastest']:.2f} | {cell(each['auto_over_ar_alone'])} | {chosen} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(measure)
