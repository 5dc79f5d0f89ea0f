"""Where a run's rows are, and what they are built from where they are not there yet."""

import dataclasses
from typing import Annotated, Literal

import pydantic
from pydantic import Field

_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetBuild:
    """What the dataset folder is built from: the fields of `train.data.DatasetSettings`, with their help."""

    __pydantic_config__ = _STRICT

    roots: Annotated[
        tuple[str, ...],
        Field(description="folders or files of text, chats or tokens; empty: Python's standard library"),
    ] = ()
    max_seq_len: Annotated[int, Field(ge=2, description="tokens of one packed row")] = 256
    vocab_size: Annotated[int | None, Field(description="train a tokenizer of this size; or give tokenizer")] = None
    tokenizer: Annotated[str | None, Field(description="folder of an existing tokenizer to reuse")] = None
    heldout_fraction: Annotated[float, Field(gt=0, le=0.5, description="share of documents held out")] = 0.03
    excluded_folders: Annotated[tuple[str, ...], Field(description="folder names passed over at any depth")] = (
        "idle_test",
        "idlelib",
        "test",
        "tests",
    )
    max_file_bytes: Annotated[int, Field(ge=1, description="larger text files are skipped")] = 1_000_000
    seed: Annotated[int, Field(ge=0, description="order of packing")] = 0
    too_long: Annotated[
        Literal["cut", "drop", "error"], Field(description="what becomes of documents longer than a row")
    ] = "cut"

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError("give exactly one of vocab_size (train a tokenizer) and tokenizer (reuse one)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Where the packed rows are."""

    __pydantic_config__ = _STRICT

    path: Annotated[str, Field(min_length=1, description="folder written by `idlm pack`")]
    build: Annotated[
        DatasetBuild | None,
        Field(description="built when absent, checked when there; null: it must be there"),
    ] = None
