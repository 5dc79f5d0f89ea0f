"""Does `deterministic="bitwise"` keep its word on real text, and what does it cost?

make bitwise    # half an hour on two cores -> benchmarks/results/bitwise/<name>.{json,md}, written as it goes

Held-out prompts are completed greedily by AR on the base model without its adapter, one prompt at a time, and by ISD
with the adapter at every stride and batch size. Tokens and the checksums of their logits must not differ once.
The default mode is compared in the same way (tokens; it reports no checksums), and timed against this one in turn.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

import idlm_jax
from benchmarks.bit_identity import Mode, cuts, differences
from benchmarks.record import origin, provenance, write
from idlm_jax.config import DType
from idlm_jax.decoding.generate import Completion
from idlm_jax.decoding.method import Method
from train.data.corpus import TextFile, read_corpus
from train.data.settings import DatasetSettings

RESULTS = Path("benchmarks/results/bitwise")
DTYPES: tuple[DType, ...] = ("bfloat16", "float32")


def heldout_texts(model: str) -> list[str]:
    """The files that the tiny model was not trained on."""
    documents = read_corpus(DatasetSettings(tokenizer=model)).heldout
    return [document.text for document in documents if isinstance(document, TextFile)]


def measure(
    model: Annotated[str, typer.Option(help="Hugging Face folder.")] = "assets/tiny-qwen3-py",
    adapter: Annotated[Path, typer.Option(help="Gated adapter.")] = Path("assets/tiny-qwen3-py-isd"),
    strides: Annotated[str, typer.Option(help="Comma-separated.")] = "2,4,8",
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,7,32",
    num_prompts: Annotated[int, typer.Option(help="A multiple of the batches compiles least.")] = 1120,
    max_tokens: Annotated[int, typer.Option()] = 8,
    rounds: Annotated[int, typer.Option(help="Of timing, each mode and method in turn.")] = 5,
    timed_prompts: Annotated[int, typer.Option()] = 64,
    name: Annotated[str, typer.Option(help="Of the result files.")] = "tiny-cpu",
) -> None:
    """Compares and times, and writes the tables."""
    methods = [idlm_jax.ISD(stride=int(stride)) for stride in strides.split(",")]
    sizes = [int(batch) for batch in batches.split(",")]
    record: dict[str, Any] = {
        **provenance(
            f"python -m benchmarks.bitwise --strides {strides} --batches {batches} --num-prompts {num_prompts} "
            f"--max-tokens {max_tokens} --rounds {rounds} --timed-prompts {timed_prompts}"
        ),
        "model": model,
        "adapter": str(adapter),
        "identity": [],
        "cost": [],
    }
    params = idlm_jax.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    cells: list[tuple[Mode, Method, int]] = [("bitwise", method, size) for size in sizes for method in methods]
    cells += [(None, method, max(sizes)) for method in methods]
    texts = heldout_texts(model)
    progress = tqdm(total=len(DTYPES) * (len(cells) + 3), unit="run")
    for dtype in DTYPES:
        base = idlm_jax.load(model, dtype=dtype)
        lm = idlm_jax.load(model, dtype=dtype, adapter=adapter)
        prompts = cuts(texts, base.tokenizer, num_prompts)
        baselines: dict[Mode, list[Completion]] = {}
        alone: list[tuple[Mode, int]] = [("bitwise", 1), (None, max(sizes))]
        for mode, batch in alone:
            baselines[mode] = idlm_jax.generate(
                base, prompts, idlm_jax.AR(), params, batch_size=batch, deterministic=mode
            )
            progress.update()
        for mode, method, batch in cells:
            found = idlm_jax.generate(lm, prompts, method, params, batch_size=batch, deterministic=mode)
            record["identity"].append(
                {
                    "dtype": dtype,
                    "mode": mode or "default",
                    "stride": method.num_masks + 1,
                    "batch": batch,
                    "prompts": len(prompts),
                    **differences(found, baselines[mode]),
                    "accepted": sum(sum(each.accepted_by_depth) for each in found),
                    "verified": sum(sum(each.verified_by_depth) for each in found),
                }
            )
            write(RESULTS, name, record, markdown(record))
            progress.update()
        record["cost"] += cost(lm, prompts[:timed_prompts], params, sizes, rounds, dtype)
        write(RESULTS, name, record, markdown(record))
        progress.update()
    print(markdown(record))


def cost(
    lm: idlm_jax.LanguageModel,
    prompts: list[list[int]],
    params: idlm_jax.SamplingParams,
    sizes: Sequence[int],
    rounds: int,
    dtype: str,
) -> list[dict[str, Any]]:
    """Time per token and forwards per token, over those of AR in the default mode at the same batch."""
    runs: list[tuple[Mode, Method]] = [
        (mode, method) for mode in (None, "bitwise") for method in (idlm_jax.AR(), idlm_jax.ISD(stride=4))
    ]
    rows = []
    for batch in (min(sizes), max(sizes)):
        seconds = np.zeros((rounds, len(runs)))
        forwards = [0] * len(runs)
        for turn in range(-1, rounds):  # the first compiles
            for column, (mode, method) in enumerate(runs):
                start = time.perf_counter()
                found = idlm_jax.generate(lm, prompts, method, params, batch_size=batch, deterministic=mode)
                if turn >= 0:
                    seconds[turn, column] = time.perf_counter() - start
                forwards[column] = sum(each.num_forwards for each in found)
        ratios = seconds / seconds[:, :1]
        rows += [
            {
                "dtype": dtype,
                "batch": batch,
                "mode": mode or "default",
                "method": "AR" if method.num_masks == 0 else f"ISD, N = {method.num_masks + 1}",
                "forwards_over_ar": forwards[column] / forwards[0],
                "time_over_ar": float(np.median(ratios[:, column])),
                "time_over_ar_range": [float(ratios[:, column].min()), float(ratios[:, column].max())],
            }
            for column, (mode, method) in enumerate(runs)
        ]
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The two tables."""
    lines = [
        f"# The bit-for-bit mode: {record['model']}",
        "",
        origin(record),
        "",
        f"Greedy. ISD with `{record['adapter']}` against AR of the base model without it: AR alone (batch 1) for the "
        "bit-for-bit mode, AR at the same batch for the default mode, which reports no checksums. A row that is not "
        "here has not been measured.",
        "",
        "| dtype | mode | N | batch | prompts | tokens | differing tokens | differing checksums | prompts that differ "
        "| drafts accepted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["identity"]:
        sums = "-" if row["differing_checksums"] is None else row["differing_checksums"]
        lines.append(
            f"| {row['dtype']} | {row['mode']} | {row['stride']} | {row['batch']} | {row['prompts']:,} | "
            f"{row['tokens']:,} | {row['differing_tokens']} | {sums} | {row['differing_prompts']} | "
            f"{row['accepted'] / row['verified']:.1%} |"
        )
    lines += [
        "",
        "Cost, over AR in the default mode at the same batch, both with the adapter loaded; medians and ranges of "
        "interleaved rounds. A CPU computes all 16 rows of a tile, so this says nothing about accelerators.",
        "",
        "| dtype | batch | mode | method | forwards | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["cost"]:
        low, high = row["time_over_ar_range"]
        lines.append(
            f"| {row['dtype']} | {row['batch']} | {row['mode']} | {row['method']} | {row['forwards_over_ar']:.2f} | "
            f"{row['time_over_ar']:.2f} ({low:.2f}-{high:.2f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(measure)
