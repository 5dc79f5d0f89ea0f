"""The trade that a server offers: tokens for everybody against the pace of one."""

from collections.abc import Sequence
from pathlib import Path

from serve.bench.measures import Measures


def plot(path: Path, measures: Sequence[Measures], note: str) -> bool:
    """Writes a PNG with a line per target and a point per load; False, and no file, if there is no point to draw.

    Points without TPOT are left out; the report says which.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines: dict[str, list[tuple[float, float, str]]] = {}
    for each in measures:
        if each.tpot_s is not None and each.tokens_per_s is not None:
            point = (1e3 * each.tpot_s.mean, each.tokens_per_s.median, each.load)
            lines.setdefault(each.target, []).append(point)
    if not lines:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for target, points in lines.items():
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=target)
        for x, y, load in points:
            axes.annotate(load, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.set(xlabel="mean time per output token (ms)", ylabel="output tokens/s", title=note or None)
    axes.margins(0.15)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
