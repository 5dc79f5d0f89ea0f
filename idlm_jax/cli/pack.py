"""`idlm pack` and `idlm show`: text, chats and tokens to a dataset folder, and what is in one."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from idlm_jax.cli.checkout import import_from_checkout


def pack(
    out: Annotated[Path, typer.Option(help="Dataset folder to create. The same command again finds it built.")],
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder or file to read; repeat for several. Takes .py .md .rst .txt, and chats or tokens in .jsonl "
            "or .arrayrecord (docs/data.md). Default: your Python's standard library."
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
    max_seq_len: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    too_long: Annotated[
        Literal["cut", "drop", "error"],
        typer.Option(
            help="What becomes of a longer document. cut: text into several pieces, a chat at its end; "
            "drop: left out and counted; error: stop and name it."
        ),
    ] = "cut",
    heldout_fraction: Annotated[
        float,
        typer.Option(help="Share of documents held out; chosen by a hash of the content, so it never moves."),
    ] = 0.03,
    include_tests: Annotated[
        bool, typer.Option(help="Read folders named idle_test, idlelib, test and tests too.")
    ] = False,
    max_file_bytes: Annotated[int, typer.Option(help="Skip larger text files (they are counted).")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Order in which documents are packed.")] = 0,
) -> None:
    """Packs documents into rows of `--max-seq-len` tokens, ready for `python -m train`.

    Files are read in sorted order, exact duplicates dropped, and every file (or chat) put on the train or
    the held-out side by a hash of its content. A tokenizer is trained on the train side, or yours is used.
    All of a text is supervised; of a chat, only what the assistant says. Nothing is downloaded.

    The folder holds meta.json (settings, counts, hashes, versions), tokenizer/ (for AutoTokenizer), and
    train/ and heldout/ with four arrays each.

    To try it: idlm pack --out out/stdlib

    To tune on chats: idlm pack --out out/chat --root chats.jsonl --tokenizer Qwen3-0.6B --max-seq-len 4096
    """
    data: Any = import_from_checkout("train.data")
    if vocab_size is None and tokenizer is None:
        vocab_size = 4096
    settings = data.DatasetSettings(
        roots=tuple(str(path) for path in root or ()),
        max_seq_len=max_seq_len,
        vocab_size=vocab_size,
        tokenizer=None if tokenizer is None else str(tokenizer),
        heldout_fraction=heldout_fraction,
        max_file_bytes=max_file_bytes,
        seed=seed,
        too_long=too_long,
        **({"excluded_folders": ()} if include_tests else {}),
    )
    _print_report(out, data.build_dataset(settings, out, show_progress=True))


def show(
    dataset: Annotated[Path, typer.Argument(help="Folder written by `idlm pack`.")],
    row: Annotated[int, typer.Option(help="Train row to print, decoded.")] = 0,
) -> None:
    """Prints the report of a dataset folder and the documents of one of its rows as text."""
    data: Any = import_from_checkout("train.data")
    report = data.read_report(dataset)
    if not 0 <= row < report.train.rows:
        raise ValueError(f"{row=} must lie in [0, {report.train.rows})")
    _print_report(dataset, report)
    packing: Any = import_from_checkout("train.data.packing")
    tokenizer = import_from_checkout("train.data.tokenizer").load_tokenizer(dataset / "tokenizer")
    rows = packing.load_rows(dataset / "train")
    segment_ids = rows.segment_ids[row]
    for segment in range(1, int(segment_ids.max()) + 1):
        here = segment_ids == segment
        supervised = int(rows.is_response[row][here].sum())
        print(f"--- row {row}, document {segment}: {int(here.sum())} tokens, {supervised} supervised ---")
        print(tokenizer.decode(rows.tokens[row][here].tolist()))


def _print_report(folder: Path, report: Any) -> None:
    state = "already built" if report.was_reused else f"built in {report.build_s:.1f} s"
    # Not the table's title: a long path would be wrapped in the middle.
    print(f"{folder}: {state}")
    table = Table("", "train", "held out")
    for column in table.columns[1:]:
        column.justify = "right"
    sides = (report.train, report.heldout)
    for label, name in (
        ("documents", "documents"),
        ("  of them dropped", "dropped"),
        ("chats truncated", "truncated"),
        ("tokens read", "tokens_read"),
    ):
        table.add_row(label, *(f"{getattr(side, name):,}" for side in sides))
    for reason in sorted({reason for side in sides for reason in side.tokens_lost}):
        table.add_row(f"  lost: {reason}", *(f"{side.tokens_lost.get(reason, 0):,}" for side in sides))
    for label, name in (
        ("tokens packed", "tokens"),
        ("  supervised", "response_tokens"),
        ("chunks", "chunks"),
        ("rows", "rows"),
    ):
        table.add_row(label, *(f"{getattr(side, name):,}" for side in sides))
    table.add_row("fill", *(f"{side.fill:.1%}" for side in sides))
    console = Console()
    console.print(table)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.skipped.items()) or "nothing"
    console.print(
        f"vocabulary {report.vocab_size:,}; rows of {report.settings.max_seq_len}; documents left out: {left_out}",
        highlight=False,
    )
