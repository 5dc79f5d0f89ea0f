"""Does "auto" keep up with the best fixed method at every load? Tokens a second of the engine, by callers at once.

python -m benchmarks.load_aware    # on two idle cores, half an hour -> benchmarks/results/load_aware/

One engine serves all the while, its callers never fewer: who has an answer asks again. Only what chooses the method of
each step is exchanged, every two seconds: "fixed" always chooses the same, "auto" as the server does. So nothing
differs but the choice, and a machine that slows down does it to all: methods take turns within a round, rounds turn the
order, and ratios are taken in rounds. Completions differ in length, as they do in earnest: where all are as long, AR
keeps the requests in step, and its batches full, as no method does whose tokens come in uneven portions (`--spread 0`
shows it). Fixed methods that are far behind after a few rounds are not run in the others.

Where "auto" mostly runs AR, the noise of two turns is larger than all that can differ between them: the steps that were
not AR's, and the time that choosing took. So that is counted too, in the turns of "auto" alone (`over_ar_by_steps`): it
is what the pacer itself sees, decode steps that read no prompt. Where another method runs it is not what callers see.
"""

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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
from serve.scheduler import Scheduler
from train.data import heldout_prompts

Request = tuple[list[int], idlm_jax.SamplingParams]

RESULTS = Path("benchmarks/results/load_aware")
AUTO = "auto"
# After so many rounds, fixed methods slower than this against the best one so far are out.
TRIAL_ROUNDS, FAR_BEHIND = 4, 0.93
PROMPT_LEN, MAX_LEN = 48, 192
NUM_REQUESTS = 256  # that differ; asked over and over
# Of a turn that do not count: steps that its predecessor chose, and the drafts that it did not leave.
SETTLE_S = 0.25
RESAMPLES = 400  # of turns, for an interval of 95 %


class Fixed(Pacer):
    """Always the same method."""

    def __init__(self, menu: Sequence[Method], index: int):
        super().__init__(menu)
        self._index = index

    def choose(self, batch: int, forwards: int = 1) -> int:
        return self._index

    def follow_seconds(self, batch: int, index: int, seconds: float) -> None:
        """Nothing follows from it."""


@dataclasses.dataclass
class Turn:
    """What was chosen in a turn, and what came of it; by batch size and method, or by method.

    Attributes:
        steps: decode steps chosen.
        seconds: of those that read no prompt beside.
        windows: whose tokens were told.
        tokens: committed by them.
        untold: steps after a change of method, whose tokens are not told.
        host_seconds: of a core, that choosing and learning took.
    """

    steps: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    seconds: defaultdict[tuple[int, int], list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    windows: Counter[int] = dataclasses.field(default_factory=Counter)
    tokens: Counter[int] = dataclasses.field(default_factory=Counter)
    untold: Counter[int] = dataclasses.field(default_factory=Counter)
    host_seconds: float = 0.0


class Turns(Pacer):
    """Whichever of several pacers has its turn, and an account of it."""

    def __init__(self, pacers: Sequence[Pacer]):
        super().__init__(pacers[0].menu)
        self.now, self.turn = pacers[0], Turn()

    def choose(self, batch: int, forwards: int = 1) -> int:
        with self._counted():
            index = self.now.choose(batch, forwards)
        self.turn.steps[batch, index] += forwards
        return index

    def follow_seconds(self, batch: int, index: int, seconds: float) -> None:
        self.turn.seconds[batch, index].append(seconds)
        with self._counted():
            self.now.follow_seconds(batch, index, seconds)

    def observe(self, index: int, forwards: int, tokens: int, verified: Sequence[int], accepted: Sequence[int]) -> None:
        self.turn.windows[index] += forwards
        self.turn.tokens[index] += tokens
        self.turn.untold[index] += not forwards
        with self._counted():
            self.now.observe(index, forwards, tokens, verified, accepted)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.turn.host_seconds += time.thread_time() - start


def over_ar_by_steps(turns: Sequence[Turn]) -> float:
    """Seconds that AR would have taken for the same tokens, over those of the steps that ran and of choosing them.

    A step's seconds are the median of its kind in these turns. Nothing is hidden behind the device's work, and a step
    after a change counts a token a window, as if it had had no drafts. Prompts, and decode steps beside one, are left
    out.
    """
    seconds: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for turn in turns:
        for kind, found in turn.seconds.items():
            seconds[kind] += found
    windows, tokens, untold = (
        sum((getattr(turn, name) for turn in turns), Counter()) for name in ("windows", "tokens", "untold")
    )
    ar_seconds = taken = 0.0
    for (batch, index), num_steps in sum((turn.steps for turn in turns), Counter()).items():
        if not (seconds[batch, index] and seconds[batch, 0]):
            continue  # too seldom to have been timed once
        ar = float(np.median(seconds[batch, 0]))
        share_untold = min(untold[index] / num_steps, 1.0) if index else 0.0
        per_window = tokens[index] / windows[index] if index and windows[index] else 1.0
        ar_seconds += num_steps * ar * (share_untold + (1 - share_untold) * per_window)
        taken += num_steps * float(np.median(seconds[batch, index]))
    return ar_seconds / (taken + sum(turn.host_seconds for turn in turns))


@contextlib.contextmanager
def callers_on(engine: Engine, requests: Sequence[Request], num_callers: int) -> Iterator[None]:
    """Keeps so many requests in the engine, until the block ends."""
    ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
    every = itertools.cycle(requests)

    def ask() -> None:
        engine.submit(*next(every), deliver=lambda piece: ended.put(True) if piece.finish_reason is not None else None)

    def serve_callers() -> None:
        while ended.get():
            ask()

    for _ in range(num_callers):
        ask()
    thread = threading.Thread(target=serve_callers)
    thread.start()
    try:
        yield
    finally:
        ended.put(False)
        thread.join()


def speed(engine: Engine, step_ended: threading.Event, seconds: float) -> float:
    """Tokens a second from now on, from the end of a step to the end of another."""

    def at_end() -> tuple[int, float]:
        step_ended.clear()
        step_ended.wait()
        return engine.stats().num_committed, time.perf_counter()

    before, start = at_end()
    time.sleep(seconds)
    after, end = at_end()
    return (after - before) / (end - start)


def measure(
    model: Annotated[str, typer.Option(help="Hugging Face folder.")] = "assets/tiny-qwen3-py",
    adapter: Annotated[Path, typer.Option(help="Gated adapter.")] = Path("assets/tiny-qwen3-py-isd"),
    dataset: Annotated[Path, typer.Option(help="With held-out prompts.")] = Path("runs/data/stdlib_256_lora"),
    callers: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,4,8,16,32,64",
    max_stride: Annotated[int, typer.Option()] = 4,
    max_tokens: Annotated[int, typer.Option(help="Of a completion, on average.")] = 64,
    spread: Annotated[float, typer.Option(help="Lengths are within this share of it, evenly.", min=0, max=1)] = 0.75,
    temperature: Annotated[float, typer.Option()] = 0.0,
    rounds: Annotated[int, typer.Option(help="Counted; one to warm up comes first.", min=TRIAL_ROUNDS)] = 30,
    turn_s: Annotated[float, typer.Option(help="Seconds that count of a method's turn.")] = 1.75,
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
    with tqdm(unit="program", desc="compiling") as bar:

        def show(done: int, total: int, program: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        device = Device(lm, config, show)
    assert device.pacer is not None
    menu = config.method.menu
    names = [*map(method_name, menu), AUTO]
    pacers = [*(Fixed(menu, index) for index in range(len(menu))), device.pacer]
    timed = {batch: device.pacer.seconds(batch) for batch in config.decode_buckets}
    record: dict[str, Any] = {
        **provenance(
            f"python -m benchmarks.load_aware --callers {callers} --max-stride {max_stride} --max-tokens "
            f"{max_tokens} --spread {spread:g} --temperature {temperature:g} --rounds {rounds} --turn-s {turn_s:g} "
            f"--name {name}"
        ),
        "model": model,
        "adapter": str(adapter),
        "step_seconds": {
            batch: {names[index]: each for index, each in seconds.items()} for batch, seconds in timed.items()
        },
        "points": [],
    }
    every = heldout_prompts(dataset, NUM_REQUESTS, PROMPT_LEN)
    lengths = np.random.default_rng(0).uniform(1 - spread, 1 + spread, len(every)) * max_tokens
    requests = [
        (prompt, idlm_jax.SamplingParams(max_tokens=max(1, round(length)), temperature=temperature, ignore_eos=True))
        for prompt, length in zip(every, lengths.tolist(), strict=True)
    ]
    step_ended = threading.Event()

    def end_step(scheduler: Scheduler) -> None:
        step_ended.set()

    for count in tqdm(points, unit="load"):
        speeds = np.full((rounds, len(names)), np.nan)
        autos: list[Turn] = []
        device.reset()
        turns = Turns(pacers)
        with (
            Engine(lm, config, device=device, pacer=turns, after_step=end_step) as engine,
            callers_on(engine, requests, count),
        ):
            for turn in tqdm(range(-1, rounds), unit="round", leave=False):
                for column in np.roll(range(len(names)), -turn):
                    if turn >= TRIAL_ROUNDS and names[column] in far_behind(names, speeds[:TRIAL_ROUNDS]):
                        continue
                    turns.now = pacers[column]
                    time.sleep(SETTLE_S)
                    turns.turn = Turn()
                    found = speed(engine, step_ended, turn_s)
                    # Its account ends with it: what follows settles, and chooses, for the next.
                    account, turns.turn = turns.turn, Turn()
                    if turn < 0:
                        continue
                    speeds[turn, column] = found
                    if names[column] == AUTO:
                        autos.append(account)
        record["points"].append(point(count, names, speeds, autos))
        write(RESULTS, name, record, markdown(record))
    print(markdown(record))


def far_behind(names: list[str], speeds: np.ndarray) -> set[str]:
    """Fixed methods that need no more rounds; AR, which ratios are over, does."""
    over_ar = dict(zip(names, np.median(speeds / speeds[:, :1], axis=0).tolist(), strict=True))
    fixed = {name: found for name, found in over_ar.items() if name != AUTO}
    return {name for name in list(fixed)[1:] if fixed[name] < FAR_BEHIND * max(fixed.values())}


def point(callers: int, names: list[str], speeds: np.ndarray, autos: Sequence[Turn]) -> dict[str, Any]:
    """What one load gave: medians and intervals of ratios within rounds."""

    def ratio(column: int, to: int) -> dict[str, float]:
        ratios = speeds[:, column] / speeds[:, to]
        ratios = np.sort(ratios[~np.isnan(ratios)])
        # Of the median, from order statistics: 95 % and more from 6 rounds on (binomial), all of them below.
        cut = binom.ppf(0.025, len(ratios), 0.5)
        low, high = (int(cut) - 1, len(ratios) - int(cut)) if cut >= 1 else (0, len(ratios) - 1)
        return {"median": float(np.median(ratios)), "low": float(ratios[low]), "high": float(ratios[high])}

    fixed = [column for column, name in enumerate(names) if name != AUTO]
    best = max(fixed, key=lambda column: float(np.nanmedian(speeds[:, column] / speeds[:, 0])))
    auto = names.index(AUTO)
    steps: Counter[str] = Counter()
    for turn in autos:
        for (_, index), number in turn.steps.items():
            steps[names[index]] += number
    rng = np.random.default_rng(0)
    resampled = [
        over_ar_by_steps([autos[each] for each in rng.integers(0, len(autos), len(autos))]) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return {
        "callers": callers,
        "over_ar": {name: ratio(column, 0) for column, name in enumerate(names)},
        "best_fixed": names[best],
        "auto_over_best_fixed": ratio(auto, best),
        "auto_over_ar_by_steps": {"median": over_ar_by_steps(autos), "low": low, "high": high},
        "chosen": dict(steps),
        "choosing_s": sum(turn.host_seconds for turn in autos) / steps.total(),
        "tokens_per_s": {
            name: speeds[~np.isnan(speeds[:, column]), column].tolist() for column, name in enumerate(names)
        },
    }


def markdown(record: dict[str, Any]) -> str:
    """The two tables."""

    def cell(ratio: dict[str, float], digits: int = 2) -> str:
        median, low, high = (f"{ratio[each]:.{digits}f}" for each in ("median", "low", "high"))
        return f"{median} ({low}-{high})"

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
        "| callers | best fixed | auto over it | auto over AR | decode steps alone | what auto chose |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in record["points"]:
        total = sum(each["chosen"].values())
        shares = sorted(each["chosen"].items(), key=lambda item: -item[1])
        chosen = ", ".join(f"{name} {number / total:.0%}" for name, number in shares if number >= 0.005 * total)
        lines.append(
            f"| {each['callers']} | {each['best_fixed']} | {cell(each['auto_over_best_fixed'], 3)} | "
            f"{cell(each['over_ar'][AUTO], 3)} | {cell(each['auto_over_ar_by_steps'], 3)} | {chosen} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(measure)
