"""The demo's picture."""

from collections.abc import Sequence
from pathlib import Path

from idlm_jax.decoding.compare import MethodReport
from idlm_jax.decoding.method import method_name


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
