"""`python -m train.data`: build a dataset folder, or show one."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from train.data.build import build_dataset
from train.data.packing import load_rows
from train.data.settings import DatasetReport, DatasetSettings, read_report
from train.data.tokenizer import load_tokenizer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
_DEFAULTS = DatasetSettings(vocab_size=4096)


@app.callback()
def _main() -> None:
    """Datasets for training: text in, packed token rows out. Nothing is downloaded."""


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Dataset folder to create. The same command again finds it built.")],
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder or file to read; repeat for several. Takes .py .md .rst .txt, and .jsonl with one "
            '{"messages": [{"role", "content"}, ...]} a line. Default: your Python\'s standard library.'
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Train a byte-level BPE with this many ids on the train side [default: 4096]."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Use this Hugging Face tokenizer folder instead: needed to train a converted checkpoint."),
    ] = None,
    max_seq_len: Annotated[
        int,
        typer.Option(help="Tokens in a row. Longer files are cut into several, longer chats are truncated."),
    ] = _DEFAULTS.max_seq_len,
    heldout_fraction: Annotated[
        float,
        typer.Option(help="Share of documents held out; chosen by a hash of the content, so it never moves."),
    ] = _DEFAULTS.heldout_fraction,
    include_tests: Annotated[
        bool, typer.Option(help=f"Read folders named {', '.join(_DEFAULTS.excluded_folders)} too.")
    ] = False,
    max_file_bytes: Annotated[
        int, typer.Option(help="Skip larger text files (they are counted).")
    ] = _DEFAULTS.max_file_bytes,
    seed: Annotated[int, typer.Option(help="Order in which documents are packed.")] = _DEFAULTS.seed,
) -> None:
    """Packs text into rows of `--max-seq-len` tokens, ready for `python -m train`.

    Files are read in sorted order, exact duplicates dropped, and every file (or chat) put on the train or
    the held-out side by a hash of its content. A tokenizer is trained on the train side, or yours is used.
    All of a text is supervised; of a chat, only what the assistant says.

    The folder holds `meta.json` (settings, counts, hashes, versions), `tokenizer/` (for AutoTokenizer), and
    `train/` and `heldout/` with four arrays each.

    To try it: `python -m train.data build --out out/stdlib`

    To tune on chats: `python -m train.data build --out out/chat --root chats.jsonl --tokenizer Qwen3-0.6B`
    """
    if vocab_size is None and tokenizer is None:
        vocab_size = _DEFAULTS.vocab_size
    try:
        settings = DatasetSettings(
            roots=tuple(str(path) for path in root or ()),
            max_seq_len=max_seq_len,
            vocab_size=vocab_size,
            tokenizer=None if tokenizer is None else str(tokenizer),
            heldout_fraction=heldout_fraction,
            excluded_folders=() if include_tests else _DEFAULTS.excluded_folders,
            max_file_bytes=max_file_bytes,
            seed=seed,
        )
        report = build_dataset(settings, out, show_progress=True)
    except ValueError as error:
        _fail(error)
    _print_report(out, report)


@app.command()
def show(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.")],
    row: Annotated[int, typer.Option(help="Train row to print, decoded.")] = 0,
) -> None:
    """Prints the report of a dataset folder and one of its rows as text."""
    try:
        report = read_report(dataset)
        _print_report(dataset, report)
        if not 0 <= row < report.train.rows:
            raise ValueError(f"{row=} must lie in [0, {report.train.rows})")
    except ValueError as error:
        _fail(error)
    rows = load_rows(dataset / "train")
    tokenizer = load_tokenizer(dataset / "tokenizer")
    segment_ids = rows.segment_ids[row]
    for segment in range(1, int(segment_ids.max()) + 1):
        here = segment_ids == segment
        answer = int(rows.is_response[row][here].sum())
        print(f"--- row {row}, document {segment}: {int(here.sum())} tokens, {answer} supervised ---")
        print(tokenizer.decode(rows.tokens[row][here].tolist()))


def _fail(error: ValueError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(1) from error


def _print_report(folder: Path, report: DatasetReport) -> None:
    state = "already built" if report.was_reused else f"built in {report.build_s:.1f} s"
    # Not the table's title: a long path would be wrapped in the middle.
    print(f"{folder}: {state}")
    table = Table("", "train", "held out")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, name in (
        ("documents", "documents"),
        ("chunks", "chunks"),
        ("rows", "rows"),
        ("tokens", "tokens"),
        ("supervised tokens", "response_tokens"),
        ("chats truncated", "truncated"),
    ):
        table.add_row(label, *(f"{getattr(split, name):,}" for split in (report.train, report.heldout)))
    table.add_row("fill", f"{report.train.fill:.1%}", f"{report.heldout.fill:.1%}")
    console = Console()
    console.print(table)
    num_tokens = report.train.tokens + report.heldout.tokens
    skipped = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items()) or "nothing"
    console.print(
        f"{report.corpus_bytes:,} bytes, {report.corpus_bytes / num_tokens:.2f} a token; vocabulary "
        f"{report.vocab_size:,}; rows of {report.settings.max_seq_len}; skipped: {skipped}"
    )


if __name__ == "__main__":
    app()
