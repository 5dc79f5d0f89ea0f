"""What a soak leaves: JSON with every sample, Markdown to read, memory and pages over time as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.soak.course import Outcome
from benchmarks.soak.watch import Sample


def write(folder: Path, name: str, outcome: Outcome, settings: dict[str, Any]) -> None:
    """Writes NAME.json, NAME.md and NAME.png.

    Args:
        folder: made if it is not there.
        name: of the files.
        outcome: of the soak.
        settings: "command", "date", "versions", "machine", "seconds", "max_growth", for the record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = {field: [_short(getattr(each, field)) for each in outcome.samples] for field in Sample._fields}
    parts = outcome._asdict() | {"before": outcome.before._asdict(), "after": outcome.after._asdict()}
    del parts["samples"]
    lines = ",\n".join(f"  {json.dumps(field)}: {json.dumps(values)}" for field, values in columns.items())
    text = json.dumps({"settings": settings, **parts}, indent=1)
    (folder / f"{name}.json").write_text(f'{text[:-2]},\n "samples": {{\n{lines}\n }}\n}}\n', encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(name, outcome, settings), encoding="utf-8")
    if outcome.samples:
        _plot(folder / f"{name}.png", outcome)


def markdown(name: str, outcome: Outcome, settings: dict[str, Any]) -> str:
    """The report: the verdict first, then what was seen against what is allowed, then what was asked."""
    samples, stats = outcome.samples, outcome.info["stats"]
    waited = max((each.num_waiting for each in samples), default=0)
    resident = [each.resident_bytes / 1e6 for each in samples] or [0.0]
    rows = [
        ("pages free at rest", f"{outcome.num_free_pages} of {outcome.num_pages}", "all"),
        ("requests left", stats["num_running"] + stats["num_waiting"], "none"),
        (
            "memory, last third over middle third",
            "not looked at" if outcome.growth is None else f"{outcome.growth:+.2%}",
            "any" if settings["max_growth"] is None else f"at most +{settings['max_growth']:.0%}",
        ),
        ("resident memory, least and most", f"{min(resident):,.0f} to {max(resident):,.0f} MB", ""),
        ("open files and sockets at rest", outcome.after.num_files, f"at most {outcome.before.num_files}, as before"),
        ("threads at rest", outcome.after.num_threads, f"{outcome.before.num_threads} before"),
        ("exit code after SIGTERM under open streams", outcome.exit_code, "0"),
        ("preemptions", f"{stats['num_preemptions']:,}", ""),
        ("most requests waiting", waited, ""),
        ("requests by end", ", ".join(f"{key} {value:,}" for key, value in sorted(stats["finished"].items())), ""),
        ("tokens committed, read by clients", f"{stats['num_committed']:,}, {outcome.num_tokens:,}", ""),
    ]
    found = [f"- {each}" for each in outcome.violations]
    verdict = [f"**{len(found)} violations:**", "", *found] if found else ["No violations."]
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    return "\n".join(
        [
            f"# Soak: {name}",
            "",
            *verdict,
            "",
            f"{settings['date']}; {settings['seconds']:g} s of traffic; {settings['machine']}; {versions}.",
            "",
            "```",
            settings["command"],
            "```",
            "",
            "| | seen | allowed |",
            "|---|---|---|",
            *(f"| {what} | {seen} | {allowed} |" for what, seen, allowed in rows),
            "",
            "Answers by kind of request and status; a kind is a method of `benchmarks/soak/traffic.py`.",
            "",
            "| | answers |",
            "|---|---|",
            *(f"| {what} | {count:,} |" for what, count in outcome.counts.items()),
            "",
            *([f"![memory and pages over time]({name}.png)", ""] if samples else []),
        ]
    )


def _short(value: float) -> float:
    return round(value, 2) if isinstance(value, float) else value


def _plot(path: Path, outcome: Outcome) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def over_time(axes: Any, values: Sequence[float], label: str | None = None) -> None:
        axes.plot([each.at_s for each in outcome.samples], values, label=label, linewidth=1)

    figure, (memory, pages) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
    resident = [each.resident_bytes / 1e6 for each in outcome.samples]
    over_time(memory, resident)
    memory.set(ylabel="resident memory (MB)", ylim=(0, 1.1 * max(resident)))
    over_time(pages, [outcome.num_pages - each.num_free_pages for each in outcome.samples], "held by requests")
    over_time(pages, [each.num_cached_pages for each in outcome.samples], "prefix cache only")
    pages.axhline(outcome.num_pages, color="grey", linestyle="--", linewidth=1, label="all there are")
    pages.set(xlabel="seconds of traffic", ylabel="pages")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    for axes in (memory, pages):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
