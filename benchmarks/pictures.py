"""The pictures of docs/concepts.md, from the code that they explain: they change when it does.

python -m benchmarks.pictures    # `make pictures`; a test compares the committed files with what this draws
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Bool, Int
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import idlm_jax
from idlm_jax.cli.plots import plot_trace, save
from idlm_jax.cli.trace import summary, texts_by_forward
from idlm_jax.decoding.window import Rows, build_window
from pallas_kernels.two_stream_attention import two_stream_attention
from train.batch import Batch
from train.layout import Layout, ObjectiveSettings, lay_out

IMAGES = Path("docs/images")
TINY, ADAPTER = "assets/tiny-qwen3-py", "assets/tiny-qwen3-py-isd"
PROMPT = "def main():"
MASK = -1  # stands for the MASK id
COLOURS = ListedColormap(["whitesmoke", "tab:blue", "tab:orange"])
SEEN = {"sees a clean row": "tab:blue", "sees a MASK row": "tab:orange"}


def draw_pictures(out: Annotated[Path, typer.Option(help="Folder to write to.")] = IMAGES) -> None:
    """Draws all of them."""
    out.mkdir(parents=True, exist_ok=True)
    save(draw_windows(), out / "window.svg")
    save(draw_training_mask(), out / "training_mask.svg")
    lm = idlm_jax.load(TINY, adapter=ADAPTER, dtype="float32")
    for name, method in {"trace": idlm_jax.ISD(stride=4), "trace_branches": idlm_jax.ISD(stride=4, branches=4)}.items():
        forwards = list(idlm_jax.trace(lm, PROMPT, method, idlm_jax.SamplingParams(max_tokens=48)))
        title = summary(method, forwards)
        plot_trace(out / f"{name}.svg", forwards, texts_by_forward(lm, forwards), title=title)


def draw_windows() -> Figure:
    """Who sees whom among the query rows of a forward, for three plans."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    one_group, every = [(3, depth) for depth in (1, 2, 3)], [(at, depth) for at in (0, 1, 2) for depth in (1, 2)]
    plans = {
        "stride 4: three drafts, one group of MASKs": (3, one_group),
        "stride 4, 7 rows: each MASK where it pays most": (2, [(0, 1), (2, 1), (0, 2), (2, 2)]),
        "stride 3, branches 3: a group for every prefix": (2, every),
    }
    for axes, (title, (num_drafts, masks)) in zip(figure.subplots(1, 3), plans.items(), strict=True):
        rows = [(index, 0) for index in range(num_drafts + 1)] + masks
        window = build_window(
            jnp.arange(num_drafts + 1)[None],
            jnp.array([num_drafts + 1]),
            jnp.zeros(1, jnp.int32),
            Rows(*(jnp.array([each]) for each in zip(*rows, strict=True))),
            MASK,
        )
        names = ["pending", *(f"draft {depth}" for depth in range(1, num_drafts + 1))]
        names += [f"MASK {depth}" for _, depth in masks]
        labels = [
            f"{name} at t+{at}" if at else f"{name} at t" for name, at in zip(names, window.positions[0], strict=True)
        ]
        # Every row sees all that was committed before the window.
        visible = np.pad(np.asarray(window.visible[0]), ((0, 0), (1, 0)), constant_values=True)
        is_mask = np.pad(np.asarray(window.is_mask[0]), (1, 0))
        _draw_mask(axes, visible, is_mask, labels, ["context", *names])
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("query row")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2)
    return figure


def draw_training_mask() -> Figure:
    """Who sees whom on [x_t | x_0] for two packed documents: a chat of three prompt tokens, and plain text."""
    lengths, prompt_lens = (9, 6), (3, 0)
    is_response = np.concatenate([np.arange(n) >= prompt for n, prompt in zip(lengths, prompt_lens, strict=True)])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    batch = Batch(*(each[None] for each in (positions, segments, positions, is_response, np.zeros_like(positions))))
    layout = lay_out(batch, ObjectiveSettings(block_length=3))
    is_mask = np.concatenate([np.asarray(layout.is_mask[0]), np.zeros(len(positions), bool)])
    names = [f"{'ab'[segment - 1]}{position}" for segment, position in zip(segments, positions, strict=True)]
    noisy = [f"MASK {name}" if masked else name for name, masked in zip(names, is_response, strict=True)]
    scored = np.concatenate([layout.is_noisy_scored[0], layout.is_clean_scored[0]])
    rows = [f"{name} {'●' if counts else ' '}" for name, counts in zip([*noisy, *names], scored, strict=True)]
    figure = Figure(figsize=(10, 10), layout="constrained")
    axes = figure.subplots()
    _draw_mask(axes, training_mask(layout), is_mask, rows, [*noisy, *names])
    axes.axhline(len(names), color="black", linewidth=1)
    axes.axvline(len(names), color="black", linewidth=1)
    axes.set(title="block length 3; left and top x_t, right and bottom x_0; ● the row is scored", ylabel="query row")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2)
    return figure


def training_mask(layout: Layout) -> Bool[np.ndarray, "R R"]:
    """Rows that each row of [x_t | x_0] attends to, read off the op that training runs.

    Without queries and keys every visible row has the same weight, and with a one-hot value of its own each row shows
    where it weighs in.
    """
    length = layout.tokens.shape[1]
    nothing = jnp.zeros((1, length, 1, 2 * length))
    noisy_values, clean_values = jnp.split(jnp.eye(2 * length)[None, :, None], 2, axis=1)
    weights = two_stream_attention(
        nothing,
        nothing,
        noisy_values,
        nothing,
        nothing,
        clean_values,
        segment_ids=layout.segment_ids,
        positions=layout.positions,
        block_start=layout.block_start,
    )
    return np.concatenate([np.asarray(each[0, :, 0] > 0) for each in weights])


def _draw_mask(
    axes: Any,
    visible: Bool[np.ndarray, "rows columns"],
    is_mask: Bool[np.ndarray, " columns"],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    shades: Int[np.ndarray, "rows columns"] = np.where(visible, np.where(is_mask, 2, 1), 0)
    axes.pcolormesh(shades, cmap=COLOURS, vmin=0, vmax=2, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0, labelsize=8)


def _legend() -> list[Patch]:
    return [Patch(color=colour, label=name) for name, colour in SEEN.items()]


if __name__ == "__main__":
    typer.run(draw_pictures)
