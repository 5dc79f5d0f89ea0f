"""AR and ISD side by side on the same prompts: tokens per forward, acceptance, speed, and whether they agree."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from idlm_jax.decoding.generate import Completion, generate
from idlm_jax.decoding.method import AR, Method
from idlm_jax.decoding.prompts import Prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class MethodReport:
    """What one method did on a set of prompts.

    Attributes:
        method: as asked for.
        completions: one per prompt.
        tokens_per_forward: all tokens over all forwards, prefills included.
        acceptance_rate: mean of min(1, p/q) over verified drafts; nan for AR.
        tokens_per_s: generated tokens per second of wall time, compilation excluded.
        num_identical: completions equal to AR's token for token; meaningful for greedy decoding.
    """

    method: Method
    completions: list[Completion]
    tokens_per_forward: float
    acceptance_rate: float
    tokens_per_s: float
    num_identical: int


def compare_methods(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    sampling: SamplingParams | Sequence[SamplingParams],
    *,
    batch_size: int = 64,
    rounds: int = 3,
) -> list[MethodReport]:
    """Runs AR and then every method, each once to compile; then `rounds` timed rounds in turn, medians kept.

    Args:
        lm: the model.
        prompts: the same for all.
        methods: what to compare with AR; AR itself is always the first report.
        sampling: the same for all.
        batch_size: most requests per compiled loop.
        rounds: timed repetitions; taken in turn (A B C A B C ...), so a machine that slows down slows all alike.
    """
    every = [AR(), *methods]
    outputs = [generate(lm, prompts, method, sampling, batch_size=batch_size) for method in every]
    seconds = np.zeros((rounds, len(every)))
    for row in seconds:
        for column, method in enumerate(every):
            start = time.perf_counter()
            generate(lm, prompts, method, sampling, batch_size=batch_size)
            row[column] = time.perf_counter() - start
    return [
        _report(method, completions, outputs[0], float(elapsed))
        for method, completions, elapsed in zip(every, outputs, np.median(seconds, axis=0), strict=True)
    ]


def _report(
    method: Method, completions: list[Completion], reference: list[Completion], elapsed_s: float
) -> MethodReport:
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    drafts = np.array([sum(completion.verified_by_depth) for completion in completions], float)
    rates = np.array([completion.acceptance_rate for completion in completions])
    total = drafts.sum()
    return MethodReport(
        method=method,
        completions=completions,
        tokens_per_forward=num_tokens / sum(completion.num_forwards for completion in completions),
        acceptance_rate=float(np.where(drafts > 0, rates * drafts, 0.0).sum() / total) if total else float("nan"),
        tokens_per_s=num_tokens / elapsed_s,
        num_identical=sum(
            completion.token_ids == other.token_ids for completion, other in zip(completions, reference, strict=True)
        ),
    )
