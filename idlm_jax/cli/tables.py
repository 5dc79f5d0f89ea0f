"""Tables shared by the commands."""

from collections.abc import Sequence

from rich.table import Table

from idlm_jax.decoding.compare import MethodReport
from idlm_jax.decoding.method import method_name


def method_table(title: str, reports: Sequence[MethodReport], *, is_greedy: bool) -> Table:
    """One row per method; the first is AR, to which speed is compared."""
    table = Table("method", "TPF", "acceptance", "tokens/s", "x AR", title=title, title_justify="left")
    if is_greedy:
        table.add_column("same tokens as AR")
    for report in reports:
        row = [
            method_name(report.method),
            f"{report.tokens_per_forward:.2f}",
            "-" if report.acceptance_rate != report.acceptance_rate else f"{report.acceptance_rate:.2f}",
            f"{report.tokens_per_s:,.0f}",
            f"{report.tokens_per_s / reports[0].tokens_per_s:.2f}",
        ]
        if is_greedy:
            row.append(f"{report.num_identical} of {len(report.completions)}")
        table.add_row(*row)
    return table
