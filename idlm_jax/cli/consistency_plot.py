"""The picture of `idlm measure`: acceptance by depth, and predicted against measured tokens per forward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from idlm_jax.cli.consistency_report import domain_name
from idlm_jax.decoding.bootstrap import Estimate
from idlm_jax.decoding.measure import Consistency
from idlm_jax.decoding.method import method_name

MARKERS = "osD^vP*X<>"


def plot_consistency(path: Path, rows: Sequence[Consistency]) -> None:
    """Writes the picture; bars are 95 % intervals. Where there are several domains, they are drawn, not their sum.

    Raises:
        ValueError: matplotlib writes no file of this kind.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    drawn = [row for row in rows if row.domain is not None]
    temperatures = list(dict.fromkeys(row.temperature for row in drawn))
    methods = list(dict.fromkeys(method_name(row.method) for row in drawn))
    domains = list(dict.fromkeys(domain_name(row) for row in drawn))
    colors = {name: f"C{index % 10}" for index, name in enumerate(methods)}
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(domains)}

    figure, axes = plt.subplots(
        1, len(temperatures) + 1, figsize=(4.6 * (len(temperatures) + 1), 4.4), layout="constrained", squeeze=False
    )
    for panel, temperature in zip(axes[0], temperatures, strict=False):
        for row in drawn:
            if row.temperature == temperature and row.acceptance is not None:
                _draw_acceptance(panel, row, colors, markers)
        panel.set(title=f"acceptance, temperature {temperature:g}", xlabel="depth of the draft", ylim=(0, 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    _draw_tokens_per_forward(axes[0, -1], drawn, colors, markers)
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    if len(domains) > 1:
        handles += [
            Line2D([], [], color="gray", marker=marker, linestyle="", label=name) for name, marker in markers.items()
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_acceptance(axes: Any, row: Consistency, colors: dict[str, str], markers: dict[str, str]) -> None:
    seen = [(depth, each) for depth, each in enumerate(row.acceptance_by_depth, start=1) if each is not None]
    axes.errorbar(
        [depth for depth, _ in seen],
        [each.value for _, each in seen],
        yerr=_bars([each for _, each in seen]),
        color=colors[method_name(row.method)],
        marker=markers[domain_name(row)],
        markersize=4,
        linewidth=1,
        capsize=2,
    )


def _draw_tokens_per_forward(
    axes: Any, rows: Sequence[Consistency], colors: dict[str, str], markers: dict[str, str]
) -> None:
    for row in rows:
        if row.predicted is not None:
            axes.errorbar(
                row.predicted.value,
                row.tokens_per_forward.value,
                xerr=_bars([row.predicted]),
                yerr=_bars([row.tokens_per_forward]),
                color=colors[method_name(row.method)],
                marker=markers[domain_name(row)],
                markersize=4,
                linewidth=1,
                capsize=2,
            )
    axes.axline((1, 1), slope=1, color="gray", linewidth=1, linestyle=":")
    axes.set(title="tokens per forward", xlabel="predicted from acceptance", ylabel="measured")
    axes.grid(alpha=0.3)


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances below and above; a bootstrap's interval need not hold its value where there are few prompts."""
    below = [max(0.0, each.value - each.low) for each in estimates]
    return [below, [max(0.0, each.high - each.value) for each in estimates]]
