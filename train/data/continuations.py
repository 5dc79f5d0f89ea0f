"""Documents -> their first tokens with a model's own continuations: introspective training on what decoding will see.

`OUT.jsonl` gets a line per document, `{"tokens", "is_response"}`, which `idlm pack` reads: the prompt is context, what
the model said is supervised. `OUT.jsonl.run` holds the settings. For chats there is `train.data.regenerate`.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from idlm_jax.decoding import SamplingParams, generate
from idlm_jax.decoding.method import Method
from idlm_jax.model.language_model import LanguageModel
from train.data.packing import load_rows
from train.data.pipeline import check_vocabulary
from train.data.regenerate import append_record, complete_records, seed_of
from train.data.settings import read_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinueSettings:
    """What decides the continuations; one output file has one of these.

    Attributes:
        model: folder or hub id.
        adapter: folder of a gated adapter; None without one.
        prompt_tokens: tokens kept of each document; shorter documents are passed over.
        max_tokens: most tokens of one continuation.
        temperature: 0 is greedy.
        seed: of the whole file; every continuation draws from its own, which follows from this and its line.
    """

    model: str
    adapter: str | None = None
    prompt_tokens: int = 32
    max_tokens: int = 224
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or min(self.prompt_tokens, self.max_tokens) < 1 or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"{self.temperature=} must not be negative, {self.prompt_tokens=} and {self.max_tokens=} must be "
                f"positive and {self.seed=} lie in [0, 2**32)"
            )


def continue_documents(
    dataset_dir: Path,
    out: Path,
    settings: ContinueSettings,
    *,
    lm: LanguageModel,
    method: Method,
    limit: int | None = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> int:
    """Continues the train documents of a dataset that `out` does not hold yet, in the order in which they are packed.

    The held-out side is never read. ISD is exact, so a continuation is a draw from the causal model whatever the
    stride. The same call on a file that was cut off goes on after its last complete line.

    Args:
        dataset_dir: folder written by `idlm pack`, with the model's own tokenizer.
        out: JSONL to write.
        settings: must be those that `out` was begun with.
        lm: the model that `settings` name.
        method: how it decodes.
        limit: continue the first so many documents only.
        batch_size: documents per compiled loop.
        show_progress: draw a bar.

    Returns:
        Documents in `out`.

    Raises:
        ValueError: no dataset, no document of more than `prompt_tokens` tokens, or one with ids that the model lacks;
            or `out` is something else or was begun with other settings.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be positive")
    check_vocabulary(dataset_dir, lm.config.vocab_size)
    prompts = list(_prompts(dataset_dir, settings.prompt_tokens, limit))
    if not prompts:
        raise ValueError(f"{dataset_dir}: no document has more than {settings.prompt_tokens} tokens; keep fewer")
    out.parent.mkdir(parents=True, exist_ok=True)
    header = dataclasses.asdict(settings) | {"dataset": read_report(dataset_dir).fingerprint}
    done = _begin(out, header)
    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=done, desc="continue", unit="doc", disable=not show_progress) as bar,
    ):
        for first in range(done, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            params = [
                SamplingParams(
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    seed=seed_of(settings.seed, line, 0),
                )
                for line in range(first + 1, first + 1 + len(batch))
            ]
            completions = generate(lm, batch, method, params, batch_size=batch_size)
            for prompt, completion in zip(batch, completions, strict=True):
                said = completion.token_ids
                flags = [False] * len(prompt) + [True] * len(said)
                append_record(file, {"tokens": prompt + said, "is_response": flags})
                bar.update()
    return max(done, len(prompts))


def _prompts(dataset_dir: Path, prompt_tokens: int, limit: int | None) -> Iterator[list[int]]:
    """The first tokens of every train document that goes on behind them."""
    rows, found = load_rows(dataset_dir / "train"), 0
    for tokens, segment_ids in zip(rows.tokens, rows.segment_ids, strict=True):
        for segment in range(1, int(segment_ids.max()) + 1):
            document = tokens[np.asarray(segment_ids == segment)]
            if len(document) <= prompt_tokens:
                continue
            if found == limit:
                return
            yield document[:prompt_tokens].tolist()
            found += 1


def _begin(out: Path, header: dict[str, Any]) -> int:
    """How many lines are there already; begins the log if there is none."""
    log = out.with_name(out.name + ".run")
    written, logged = complete_records(out), complete_records(log)
    if not logged:
        if written:
            raise ValueError(f"{out} exists and {log.name} beside it does not: choose another output file")
        log.write_text(json.dumps(header) + "\n", encoding="utf-8")
    elif logged[0] != header:
        raise ValueError(f"{out} was begun with {logged[0]}, now {header}: choose another output file, or delete both")
    return len(written)
