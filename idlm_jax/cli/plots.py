"""The pictures that commands draw."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from idlm_jax.decoding.compare import MethodReport
from idlm_jax.decoding.method import method_name
from idlm_jax.decoding.trace import Forward, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCE_COLOURS = {
    Source.PREFILL: "tab:gray",
    Source.DRAFT: "tab:blue",
    Source.BONUS: "tab:green",
    Source.CORRECTION: "tab:orange",
    Source.COLD_START: "tab:red",
    Source.PLAIN: "tab:purple",
}
SPACES = str.maketrans({" ": "·", "\n": "⏎", "\t": "→"})


def plot_demo(
    path: Path,
    losses: Sequence[tuple[int, float]],
    acceptance: Sequence[tuple[int, float]],
    reports: Sequence[MethodReport],
) -> Path:
    """Writes a PNG: loss and acceptance over training steps, and tokens per forward by method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot(*zip(*losses, strict=True), color="tab:blue")
    left.set(title="introspective training", xlabel="step", ylabel="CE at MASK rows (nats)")
    middle.plot(*zip(*acceptance, strict=True), marker="o", color="tab:orange")
    middle.set(title="held-out acceptance of a draft", xlabel="step", ylabel="sum of min(p, q)", ylim=(0, None))
    bars = right.bar(
        [method_name(report.method) for report in reports],
        [report.tokens_per_forward for report in reports],
        color="tab:green",
    )
    right.bar_label(bars, fmt="%.2f")
    right.margins(y=0.1)
    right.set(title="same tokens, fewer forwards", ylabel="tokens per forward")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def plot_trace(path: Path, forwards: Sequence[Forward], texts: Sequence[Sequence[str]], *, title: str) -> Path:
    """Writes an SVG or PNG: one column per committed token, one row per forward, and the refused drafts as outlines.

    Args:
        path: its suffix says which.
        forwards: as `decoding.trace` gives them.
        texts: of every token of every forward.
        title: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    labels = [text for pieces in texts for text in pieces]
    ends = list(itertools.accumulate(len(forward.token_ids) for forward in forwards))
    # The last refused draft may stand beyond the last token.
    width = max(len(labels), *(end - len(f.token_ids) + len(f.drafts) for f, end in zip(forwards, ends, strict=True)))
    figure = Figure(figsize=(1.5 + 0.22 * width, 2.2 + 0.17 * len(forwards)), layout="constrained")
    axes = figure.subplots()
    for row, (forward, end) in enumerate(zip(forwards, ends, strict=True)):
        first = end - len(forward.token_ids)
        for depth in range(len(forward.drafts)):
            axes.add_patch(Rectangle((first + depth, row), 1, 1, fill=False, edgecolor="silver", linewidth=0.6))
        for depth, source in enumerate(forward.sources):
            axes.add_patch(Rectangle((first + depth, row), 1, 1, color=SOURCE_COLOURS[source], linewidth=0))
    axes.set(xlim=(0, width), ylim=(len(forwards), 0), ylabel="forward", title=title)
    axes.set_xticks([at + 0.5 for at in range(len(labels))])
    axes.set_xticklabels([text.translate(SPACES) for text in labels], rotation=90, fontsize=7, parse_math=False)
    axes.tick_params(length=0)
    seen = {source for forward in forwards for source in forward.sources}
    legend = [Patch(color=colour, label=source.value) for source, colour in SOURCE_COLOURS.items() if source in seen]
    if any(forward.drafts for forward in forwards):
        legend.append(Patch(fill=False, edgecolor="silver", label="draft not taken"))
    axes.legend(handles=legend, loc="upper right", fontsize=8)
    save(figure, path)
    return path


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure whose bytes follow from what it shows: no date, no random ids."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "idlm", "svg.fonttype": "none"}), warnings.catch_warnings():
        # A token may hold a character that no font at hand has; a box is drawn for it.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
