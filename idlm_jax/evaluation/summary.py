"""The table: what was measured here, and beside it, in columns of their own, what others published."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from idlm_jax.evaluation.run import Result, Run
from idlm_jax.evaluation.suite import FOLDER, Benchmark, Strict, read_yaml

NONE = "-"
NOT_RUN = "not run"
CAUTION = (
    "Published figures are their authors'. Prompts, answer extraction and the number of samples differ from the ones "
    "here, so a column is for orientation and a difference of a few points shows nothing."
)


class Source(Strict):
    """Where figures were read."""

    title: str
    url: str
    seen: str


class Published(Strict):
    """A model's published scores, in percent, by benchmark; those that nobody published are absent."""

    name: str
    sources: tuple[str, ...]
    scores: dict[str, float]


class PublishedFile(Strict):
    """`published.yaml`."""

    sources: dict[str, Source]
    models: tuple[Published, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A benchmark and what there is to say of it; `why` says what there is no result for."""

    benchmark: Benchmark
    result: Result | None
    why: str


def read_published() -> PublishedFile:
    """The committed file.

    Raises:
        ValueError: it is malformed, or names a source that it does not have.
    """
    file = read_yaml(FOLDER / "published.yaml", PublishedFile)
    if missing := {name for model in file.models for name in model.sources} - set(file.sources):
        raise ValueError(f"published.yaml has no source {', '.join(sorted(missing))}")
    return file


def columns_for(rows: Sequence[Row], published: PublishedFile) -> list[Published]:
    """The models of which something was published on one of these benchmarks."""
    names = {row.benchmark.name for row in rows}
    return [model for model in published.models if names & set(model.scores)]


def as_table(run: Run, rows: Sequence[Row], published: PublishedFile) -> Table:
    """For the terminal."""
    caution = CAUTION if columns_for(rows, published) else None
    table = Table(title=_title(run), title_justify="left", caption=caution, caption_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(_header(rows, published)):
        # In a narrow window other columns fold first.
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number < 2)
    for row in rows:
        table.add_row(*_cells(row, columns_for(rows, published)))
    return table


def as_markdown(run: Run, rows: Sequence[Row], published: PublishedFile) -> str:
    """For a file: the table, how it was measured, what to know of each row, and the sources."""
    header = _header(rows, published)
    lines = [f"# {_title(run)}", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_cells(row, columns_for(rows, published))) + " |" for row in rows]
    sampling = ", ".join(f"{name} {value}" for name, value in run.suite.sampling.model_dump(exclude_none=True).items())
    lines += [
        "",
        "Score in percent ± standard error over the questions, where the harness gives one. TPF: tokens per forward of "
        "the server meanwhile; acceptance: share of its drafts that were kept; both include whatever else it served. "
        f"Sampling: {sampling}, seed {run.options.seed}.",
    ]
    lines += ["", "## Rows", ""]
    for row in rows:
        how = f"{row.result.harness}, `{row.result.task}`" if row.result else row.why
        ran = f"; generated programs: {row.result.sandbox}" if row.result and row.result.sandbox else ""
        lines.append(f"- **{row.benchmark.title}** ({how}{ran}). {row.benchmark.note}".rstrip())
    shown = columns_for(rows, published)
    if shown:
        lines += ["", "## Published figures", "", CAUTION, ""]
        for key, source in published.sources.items():
            models = ", ".join(model.name for model in shown if key in model.sources)
            if models:
                lines.append(f"- {models}: {source.title}, <{source.url}>, seen {source.seen}")
    return "\n".join(lines) + "\n"


def as_json(run: Run, rows: Sequence[Row], published: PublishedFile, server: Mapping[str, object] | None) -> str:
    """Everything, for programs. `server` is what it says about itself."""
    content = {
        "asked": run.asked(),
        "server": server,
        "benchmarks": [
            {
                "name": row.benchmark.name,
                "title": row.benchmark.title,
                "result": None if row.result is None else dataclasses.asdict(row.result),
                "why_no_result": row.why or None,
                "note": row.benchmark.note,
                "published": {
                    model.name: model.scores[row.benchmark.name]
                    for model in published.models
                    if row.benchmark.name in model.scores
                },
            }
            for row in rows
        ],
        "sources": {
            model.name: [published.sources[key].model_dump() for key in model.sources] for model in published.models
        },
    }
    return json.dumps(content, indent=2) + "\n"


def write_summary(
    folder: Path, run: Run, rows: Sequence[Row], published: PublishedFile, server: Mapping[str, object] | None
) -> None:
    """Writes `summary.md` and `summary.json`."""
    (folder / "summary.md").write_text(as_markdown(run, rows, published))
    (folder / "summary.json").write_text(as_json(run, rows, published, server))


def _title(run: Run) -> str:
    part = "" if run.options.limit is None else f", the first {run.options.limit} questions of each part only"
    return f"{run.suite.name}: {run.target.model}{part}"


def _header(rows: Sequence[Row], published: PublishedFile) -> list[str]:
    return ["benchmark", "here", "questions", "TPF", "acceptance", *(m.name for m in columns_for(rows, published))]


def _cells(row: Row, columns: Sequence[Published]) -> list[str]:
    result = row.result
    figures = [model.scores.get(row.benchmark.name) for model in columns]
    others = [NONE if figure is None else f"{figure:.1f}" for figure in figures]
    if result is None:
        return [row.benchmark.title, NOT_RUN, NONE, NONE, NONE, *others]
    error = "" if result.stderr_percent is None else f" ± {result.stderr_percent:.1f}"
    return [
        row.benchmark.title,
        f"{result.percent:.1f}{error}",
        NONE if result.num_samples is None else str(result.num_samples),
        NONE if result.tokens_per_forward is None else f"{result.tokens_per_forward:.2f}",
        NONE if result.acceptance_rate is None else f"{result.acceptance_rate:.2f}",
        *others,
    ]
