"""How often drafts are accepted while decoding, by what stands before them: a bonus, or a refused draft's correction.

    python -m benchmarks.drafts    # minutes on two cores -> benchmarks/results/drafts/<name>.{json,md}

A group of MASKs does not see the token that verification will put behind its prefix. Where every draft of a forward is
accepted, that token is the bonus, a draw from p; where one is refused, it is drawn from (p - q)+, so it is one that the
model's MASKs did not expect. With branches both kinds of groups are drafted from, and here they are counted apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Float, Int
from tqdm import tqdm

import idlm_jax
from benchmarks.record import origin, provenance, write
from idlm_jax.decoding.bootstrap import Estimate, ratio, resampled
from idlm_jax.decoding.generate import prepare_batch
from idlm_jax.decoding.loop import run_loop, run_prefill
from idlm_jax.decoding.method import ISD
from idlm_jax.decoding.state import DecodeState, Finish
from train.data import heldout_prompts

RESULTS = Path("benchmarks/results/drafts")
# What the token before a group's drafts is, and whether the group saw it.
BONUS, CORRECTION, SEEN = range(3)
KINDS = {"bonus": BONUS, "correction": CORRECTION, "cold start": SEEN}


class Watched(NamedTuple):
    """What became of R prompts; K kinds of groups, M depths."""

    tokens: Int[np.ndarray, " R"]
    forwards: Int[np.ndarray, " R"]
    verified: Int[np.ndarray, "R K M"]  # drafts whose fate decided a token
    accept_probs: Float[np.ndarray, "R K M"]  # sums of min(1, p/q) over them


def watch(
    lm: idlm_jax.LanguageModel,
    prompts: Sequence[list[int]],
    method: ISD,
    params: Sequence[idlm_jax.SamplingParams],
    *,
    batch_size: int = 64,
) -> Watched:
    """Decodes as `generate` does, forward by forward, and tells drafts apart by the group that they come from."""
    parts = [
        _watch_batch(lm, prompts[at : at + batch_size], method, params[at : at + batch_size])
        for at in range(0, len(prompts), batch_size)
    ]
    return Watched(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _watch_batch(
    lm: idlm_jax.LanguageModel, prompts: Sequence[list[int]], method: ISD, params: Sequence[idlm_jax.SamplingParams]
) -> Watched:
    prepared = prepare_batch(lm, prompts, method, params)
    state = run_prefill(lm.graph, lm.params, prepared.plan, prepared.state, prepared.prefill_rows)
    verified = np.zeros((len(state.pending), len(KINDS), method.num_masks), np.int64)
    accept_probs = np.zeros(verified.shape)
    # The prefill commits a draw from p, behind which its own group drafted.
    kind, before = np.full(len(verified), BONUS), _read(state)
    while (before["finish"] == Finish.RUNNING).any():
        state = run_loop(lm.graph, lm.params, prepared.plan, state, jnp.int32(1))
        after = _read(state)
        every = np.arange(len(kind))
        verified[every, kind] += after["verified"] - before["verified"]
        accept_probs[every, kind] += after["accept_prob"] - before["accept_prob"]
        num_accepted = (after["accepted"] - before["accepted"]).sum(1)
        is_cold, is_refused = before["num_proposals"] == 0, num_accepted < before["num_proposals"]
        kind = np.where(is_cold, SEEN, np.where(is_refused, CORRECTION, BONUS))
        before = after
    num = slice(len(prompts))
    tokens = before["context_len"][num] + 1 - np.array(prepared.prompt_lens)
    return Watched(tokens, before["forwards"][num], verified[num], accept_probs[num])


def _read(state: DecodeState) -> dict[str, np.ndarray]:
    # Copies: the next forward is given the buffers.
    fields = state.counts._asdict() | {
        name: getattr(state, name) for name in ("finish", "num_proposals", "context_len")
    }
    return {name: np.array(value) for name, value in fields.items()}


def summary(watched: Watched) -> dict[str, Any]:
    """Means over tokens and drafts, with 95 % intervals from resampled prompts; and every prompt's forwards."""
    tokens, forwards, verified, sums = watched

    weights = resampled([len(tokens)])

    def mean(above: np.ndarray, below: np.ndarray) -> dict[str, Any]:
        found = ratio(above, below, weights) or Estimate(0.0, 0.0, 0.0)  # of no draft at all
        return {"mean": found.value, "interval": [found.low, found.high], "count": int(below.sum())}

    return {
        "tokens_per_forward": mean(tokens, forwards),
        "forwards": forwards.tolist(),
        "acceptance": mean(sums.sum((1, 2)), verified.sum((1, 2))),
        "by_kind": {
            name: [mean(sums[:, kind, depth], verified[:, kind, depth]) for depth in range(verified.shape[2])]
            for name, kind in KINDS.items()
        },
    }


def measure_drafts(
    lm: idlm_jax.LanguageModel, prompts: Sequence[list[int]], methods: Sequence[ISD], max_tokens: int = 64
) -> list[dict[str, Any]]:
    """One `summary` per temperature (0 and 1) and method."""
    found = []
    plan = [(temperature, method) for temperature in (0.0, 1.0) for method in methods]
    for temperature, method in tqdm(plan, desc="drafts", unit="method"):
        params = [
            idlm_jax.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
            for seed in range(len(prompts))
        ]
        counted = summary(watch(lm, prompts, method, params))
        found.append({"temperature": temperature, "stride": method.stride, "branches": method.branches, **counted})
    return found


def measure(
    model: Annotated[str, typer.Option(help="Hugging Face folder.")] = "assets/tiny-qwen3-py",
    adapter: Annotated[Path, typer.Option(help="Gated adapter.")] = Path("assets/tiny-qwen3-py-isd"),
    dataset: Annotated[Path, typer.Option(help="With held-out prompts.")] = Path("runs/data/stdlib_256_lora"),
    stride: Annotated[int, typer.Option()] = 4,
    num_prompts: Annotated[int, typer.Option()] = 128,
    max_tokens: Annotated[int, typer.Option()] = 64,
    name: Annotated[str, typer.Option(help="Of the result files.")] = "tiny-cpu",
) -> None:
    """Counts with one group, with the rows of two, and with one behind every prefix, greedily and at temperature 1."""
    lm = idlm_jax.load(model, adapter=adapter, dtype="float32")
    prompts = heldout_prompts(dataset, num_prompts, 48)
    methods = [ISD(stride, branches=branches) for branches in sorted({1, 2, stride})]
    record = {
        **provenance(f"python -m benchmarks.drafts --stride {stride} --num-prompts {len(prompts)}"),
        "model": model,
        "adapter": str(adapter),
        "max_tokens": max_tokens,
        "rows": measure_drafts(lm, prompts, methods, max_tokens),
    }
    write(RESULTS, name, record, markdown(record))
    print(markdown(record))


def markdown(record: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"# Drafts by the token before them: {record['model']}",
        "",
        origin(record, "float32") + f" {record['max_tokens']} tokens per prompt. Acceptance is "
        "the mean of min(1, p/q) over drafts that decided a token, at depth 1, 2, ...; intervals are 95 %, over "
        "prompts. Groups do not see a bonus or a correction; after a cold start they see the correction.",
        "",
        "| T | N | branches | TPF | acceptance | behind a bonus | behind a correction | after a cold start |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        kinds = [" ".join(map(_short, row["by_kind"][name])) for name in KINDS]
        columns = [
            f"{row['temperature']:g}",
            str(row["stride"]),
            str(row["branches"]),
            with_interval(row["tokens_per_forward"]),
            with_interval(row["acceptance"]),
            *kinds,
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def fewer_forwards(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Forwards of `reference` over those of `row`, for completions of equal length; prompts are resampled in pairs."""
    ours, theirs = np.array(row["forwards"]), np.array(reference["forwards"])
    found = ratio(theirs, ours, resampled([len(ours)]))
    assert found is not None  # every completion took a forward
    return {"mean": found.value, "interval": [found.low, found.high]}


def mean_interval(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several seeds' means, and of their intervals: not narrower, for they share the prompts."""
    return {
        "mean": float(np.mean([value["mean"] for value in values])),
        "interval": np.mean([value["interval"] for value in values], axis=0).tolist(),
    }


def with_interval(value: dict[str, Any]) -> str:
    """A mean and its 95 % interval."""
    low, high = value["interval"]
    return f"{value['mean']:.3f} ({low:.3f}-{high:.3f})"


def _short(value: dict[str, Any]) -> str:
    return f"{value['mean']:.2f}±{(value['interval'][1] - value['interval'][0]) / 2:.2f}" if value["count"] else "-"


if __name__ == "__main__":
    typer.run(measure)
