"""What `idlm measure` found, as a table in the terminal, as Markdown, and as JSON."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
from rich.table import Table

from idlm_jax.cli.provenance import origin
from idlm_jax.decoding.bootstrap import Estimate
from idlm_jax.decoding.measure import Consistency
from idlm_jax.decoding.method import method_name

ABOUT = ("prompts", "T", "method")
FIGURES = ("acceptance", "by depth", "TPF", "predicted", "endless", "cold", "rows/token", "TPF²/rows")
# A terminal of 80 columns takes two tables, and one figure less.
NARROW = (
    ("prompts", "method", "acceptance", "by depth"),
    ("prompts", "method", "TPF", "predicted", "cold", "rows/token", "TPF²/rows"),
)
HELDOUT = ("held-out text", "clean loss", "noisy loss", "by depth", "acceptance", "by depth")
EVERYTHING = "all"  # how prompts of all domains together are called


def consistency_tables(rows: Sequence[Consistency]) -> list[Table]:
    """For the terminal: agreement, and what it is worth, for each temperature."""
    tables = []
    for temperature in dict.fromkeys(row.temperature for row in rows):
        for heading, columns in zip(("agreement", "what it is worth"), NARROW, strict=True):
            table = _table(f"temperature {temperature:g}: {heading}", columns)
            for row in rows:
                if row.temperature == temperature:
                    cells = _cells(row, _short)
                    table.add_row(*(cells[name] for name in columns))
            tables.append(table)
    return tables


def heldout_table(heldout: Mapping[str, Mapping[str, float]]) -> Table:
    """Teacher-forced means of each dataset."""
    table = _table("teacher-forced, losses in nats per token", HELDOUT)
    for domain, means in heldout.items():
        table.add_row(*_heldout_cells(domain, means))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name)
    return table


def as_markdown(record: Mapping[str, Any], rows: Sequence[Consistency]) -> str:
    """The tables, and where they come from."""
    columns = [*ABOUT, *FIGURES]
    lines = [
        f"# Consistency: {record['model']}",
        "",
        f"{origin(dict(record), record['quantize'] or record['dtype'])} {_asked(record)}",
        "",
        *_markdown_table(columns, [[cells[name] for name in columns] for cells in (_cells(row, str) for row in rows)]),
    ]
    if record["heldout"]:
        cells = [_heldout_cells(domain, means) for domain, means in record["heldout"].items()]
        lines += ["", *_markdown_table(HELDOUT, cells)]
    return "\n".join(lines) + "\n"


def as_json(row: Consistency) -> dict[str, Any]:
    """A row with every figure; the method both by its short name and in full."""
    return dataclasses.asdict(row) | {"method": method_name(row.method), "method_in_full": str(row.method)}


def domain_name(row: Consistency) -> str:
    """Of the prompts."""
    return EVERYTHING if row.domain is None else row.domain


def _asked(record: Mapping[str, Any]) -> str:
    sampling = record["sampling"]
    filters = [f"{name} {sampling[name]}" for name, off in (("top_k", 0), ("top_p", 1.0)) if sampling[name] != off]
    sizes = ", ".join(f"{num} prompts of {domain}" for domain, num in record["num_prompts"].items())
    end = "all of them generated" if sampling["ignore_eos"] else "fewer where the text ends"
    sampled = f" Sampling with {', '.join(filters)}." if filters else ""
    return f"{sizes}; {sampling['max_tokens']} tokens each, {end}.{sampled} Intervals are 95 %, over prompts."


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def _cells(row: Consistency, show: Callable[[Estimate], str]) -> dict[str, str]:
    """By column."""

    def text(estimate: Estimate | None) -> str:
        return "-" if estimate is None else show(estimate)

    depths = " ".join("-" if each is None else f"{each.value:.2f}" for each in row.acceptance_by_depth)
    return {
        "prompts": domain_name(row),
        "T": f"{row.temperature:g}",
        "method": method_name(row.method),
        "acceptance": text(row.acceptance),
        "by depth": depths or "-",
        "TPF": text(row.tokens_per_forward),
        "predicted": text(row.predicted),
        "endless": "-" if row.predicted_long is None else f"{row.predicted_long.value:.3f}",
        "cold": f"{row.cold_share:.1%}",
        "rows/token": "-" if row.rows_per_token is None else f"{row.rows_per_token:.2f}",
        "TPF²/rows": "-" if row.compute_efficiency is None else f"{row.compute_efficiency.value:.3f}",
    }


def _short(estimate: Estimate) -> str:
    """With half the interval's width, which takes less room than both of its ends."""
    return f"{estimate.value:.3f}±{(estimate.high - estimate.low) / 2:.3f}"


def _heldout_cells(domain: str, means: Mapping[str, float]) -> list[str]:
    def by_depth(name: str) -> str:
        depths = sorted(key for key in means if key.startswith(f"{name}/depth_"))
        return " ".join(f"{means[key]:.3f}" for key in depths)

    return [
        domain,
        f"{means['ce_clean']:.3f}",
        f"{means['ce_noisy']:.3f}",
        by_depth("ce_noisy"),
        f"{means['acceptance']:.3f}",
        by_depth("acceptance"),
    ]
