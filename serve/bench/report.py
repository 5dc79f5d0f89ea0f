"""What is written: tables for the terminal and for Markdown, notes, and everything as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.markup
import rich.table
from rich.console import Console

from serve.bench.measures import Distribution, Measures, Ratios, Spread, TextComparison
from serve.bench.rounds import WARM_UP, Run

BUSY_SHARE = 0.5  # of a core; above it the load generator itself may be what is slow
LATE_S = 0.01


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first two columns are names."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that is known at the end.

    Attributes:
        settings: as given, and what stands for it: command, machine, versions, date, models, what servers say.
        runs: with a record of every request.
        measures: per load and target.
        ratios: to `baseline`.
        baseline: name of the target that others are compared with.
        texts: compared completions; None if that was not asked for.
        num_prompts_in_file: to say when prompts were asked again.
        short_loads: labels of closed loops that have few prompts for their callers.
        was_interrupted: by Ctrl-C.
    """

    settings: dict[str, Any]
    runs: Sequence[Run]
    measures: Sequence[Measures]
    ratios: Sequence[Ratios]
    baseline: str
    texts: Sequence[TextComparison] | None
    num_prompts_in_file: int
    short_loads: Sequence[str]
    was_interrupted: bool

    @property
    def num_failures(self) -> int:
        """Of all runs, the warm-up included."""
        return sum(len(run.failures) for run in self.runs)


def tables(result: Result) -> list[Table]:
    """The tables that have rows."""
    throughput, latency, requests, clients = [], [], [], []
    for each in result.measures:
        name = [each.load, each.target]
        acceptance = " ".join(f"{rate:.3f}" for rate in each.acceptance_by_depth or ()) or "-"
        rates = [_spread(each.requests_per_s), _spread(each.tokens_per_s)]
        throughput.append([*name, *rates, _number(each.tokens_per_forward), acceptance])
        for measure, values in (("TTFT", each.ttft_s), ("TPOT", each.tpot_s), ("E2E", each.latency_s)):
            latency.append([*name, measure, *_milliseconds(values)])
        tokens = [_number(each.prompt_tokens, 1), _percent(each.cached_share), _number(each.completion_tokens, 1)]
        requests.append([*name, str(each.num_answers), str(sum(each.num_failures.values())), *tokens])
        cost = [_number(each.client_s_per_chunk, 0, 1e6), _percent(each.client_cpu_share)]
        clients.append([*name, *cost, _number(each.late_s, 1, 1e3)])
    ratios = [
        [each.load, each.target, str(each.num_rounds)]
        + [_spread(value) for value in (each.tokens_per_s, each.ttft, each.tpot, each.latency)]
        for each in result.ratios
    ]
    texts = [
        [each.load, each.target, str(each.num_compared), str(each.num_different), _difference(each)]
        for each in result.texts or ()
    ]
    name = ("load", "target")
    found = [
        Table(
            "Throughput, median over rounds (min..max)",
            (*name, "requests/s", "output tokens/s", "tokens/forward", "acceptance by depth"),
            throughput,
        ),
        Table("Latency in ms, over requests", (*name, "", "mean", "p50", "p90", "p99"), latency),
        Table(
            f"Target / {result.baseline}, taken each round: median (min..max)",
            (*name, "rounds", "tokens/s", "TTFT", "TPOT", "E2E"),
            ratios,
        ),
        Table("Requests, and their mean tokens", (*name, "answered", "failed", "prompt", "cached", "output"), requests),
        Table("What the load generator took", (*name, "us/chunk", "of a core", "sent late by up to ms"), clients),
        Table("Failed requests, in no number above", (*name, "kind", "count", "first"), _failures(result)),
        Table(
            f"Completions that differ from those of {result.baseline}",
            (*name, "compared", "different", "first difference"),
            texts,
        ),
    ]
    return [table for table in found if table.rows]


def notes(result: Result) -> list[str]:
    """What a reader of the tables must know."""
    found = []
    if result.was_interrupted:
        broken = [run for run in result.runs if not run.is_complete]
        where = ", ".join(
            f"{run.load} on {run.target}, {_round(run)}, after {len(run.records)} requests" for run in broken
        )
        found.append(f"Interrupted{': ' + where if where else ' between runs'}. What followed was not measured.")
    for each in result.measures:
        where = f"{each.load} on {each.target}"
        if not each.is_complete:
            found.append(f"{where}: no round was completed; its throughput counts the requests that had ended.")
        if each.num_answers and each.tpot_s is None:
            found.append(f"{where}: no answer had two tokens, so there is no TPOT, and no point in the plot.")
        if (each.client_cpu_share or 0) > BUSY_SHARE:
            found.append(
                f"{where}: the load generator used {_percent(each.client_cpu_share)} of a core and may limit it."
            )
        if (each.late_s or 0) > LATE_S:
            late = f"{1e3 * (each.late_s or 0):.0f} ms"
            found.append(f"{where}: a request was sent {late} late. Latencies count from when it was due.")
    for load in [load for load in result.short_loads if any(run.load == load for run in result.runs)]:
        found.append(f"{load}: few prompts per caller, so its throughput includes much of the emptying at the end.")
    num_asked = max((run.first + len(run.records) for run in result.runs), default=0)
    if num_asked > result.num_prompts_in_file:
        found.append(
            f"The file's {result.num_prompts_in_file} prompts were asked again for a total of {num_asked} per target: "
            "servers that cache prefixes skip work (column 'cached')."
        )
    return found


def print_report(result: Result, console: Console) -> None:
    """Prints tables and notes."""
    for table in tables(result):
        shown = rich.table.Table(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*(rich.markup.escape(cell) for cell in row))
        console.print(shown)
    for note in notes(result):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def write_report(result: Result, folder: Path, *, has_plot: bool) -> None:
    """Writes `result.json` and `report.md`."""
    content = result.settings | {
        "measures": [dataclasses.asdict(each) for each in result.measures],
        "baseline": result.baseline,
        "ratios": [dataclasses.asdict(each) for each in result.ratios],
        "texts": None if result.texts is None else [dataclasses.asdict(each) for each in result.texts],
        "notes": notes(result),
        "was_interrupted": result.was_interrupted,
        "runs": [dataclasses.asdict(run) for run in result.runs],
    }
    (folder / "result.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    (folder / "report.md").write_text(markdown(result, has_plot=has_plot))


def markdown(result: Result, *, has_plot: bool) -> str:
    """The report as one page."""
    settings = result.settings
    machine, versions = settings["machine"], settings["versions"]
    lines = ["# Serving benchmark", ""]
    if settings["note"]:
        lines += [settings["note"], ""]
    lines += ["```text", settings["command"], "```", ""]
    lines += [
        f"{settings['date']}; load generator on {machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
    ]
    lines += [f"- {target['name']}: `{target['model']}` at {target['url']}" for target in settings["targets"]]
    options = ", ".join(f"{name}={value}" for name, value in settings["options"].items() if value not in (None, ""))
    lines += ["", f"Settings: {options}.", ""]
    for table in tables(result):
        rule = ["---"] * len(table.header)
        rows = [table.header, rule, *table.rows]
        lines += [f"## {table.title}", ""]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines += [""]
    lines += ["![output tokens per second against time per output token](plot.png)", ""] if has_plot else []
    lines += [f"- {note}" for note in notes(result)]
    lines += [""] if notes(result) else []
    lines += [
        "TTFT: from when a request was due to its first text. TPOT: from there to the last token, per token after the "
        "first. E2E: to the last token. Percentiles are over the requests of all counted rounds. The warm-up round of "
        "every load is in `result.json` only.",
        "",
    ]
    return "\n".join(lines)


def _failures(result: Result) -> list[list[str]]:
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for run in result.runs:
        for failure in run.failures:
            load = f"{run.load} (warm-up)" if run.round == WARM_UP else run.load
            kinds.setdefault((load, run.target, failure.kind), []).append(failure.detail)
    return [[*key, str(len(details)), details[0][:120]] for key, details in kinds.items()]


def _difference(texts: TextComparison) -> str:
    if texts.first_difference is None:
        return "-"
    number, prompt, text, other = texts.first_difference
    pairs = zip(text, other, strict=False)
    place = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    at = f"round {number}, prompt {prompt}, character {place}"
    return f"{at}: {text[place : place + 16]!r}, not {other[place : place + 16]!r}"


def _round(run: Run) -> str:
    return "warm-up" if run.round == WARM_UP else f"round {run.round}"


def _spread(value: Spread | None) -> str:
    if value is None:
        return "-"
    middle = _number(value.median)
    return middle if value.min == value.max else f"{middle} ({_number(value.min)}..{_number(value.max)})"


def _milliseconds(value: Distribution | None) -> list[str]:
    if value is None:
        return ["-"] * 4
    return [f"{1e3 * each:,.1f}" for each in (value.mean, value.p50, value.p90, value.p99)]


def _number(value: float | None, decimals: int | None = None, scale: float = 1.0) -> str:
    """Without `decimals`, three significant digits and no decimals above a hundred."""
    if value is None:
        return "-"
    scaled = value * scale
    if decimals is None:
        decimals = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:,.{decimals}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"
