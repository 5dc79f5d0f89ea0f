"""How far a model agrees with its own drafts, and what that is worth: acceptance, tokens per forward, rows.

Works from what a `Completion` reports, so it knows nothing of how a method decodes. docs/measuring.md has the formulas.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from idlm_jax.decoding.bootstrap import Estimate, Weights, estimate, ratio, resampled, safe_ratio
from idlm_jax.decoding.chain import Chain, chain_of, expected_forwards, tokens_per_forward
from idlm_jax.decoding.generate import Completion, generate
from idlm_jax.decoding.method import AR, ISD, Method, TwoPass
from idlm_jax.decoding.prompts import Prompt, encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import LanguageModel


class Tally(NamedTuple):
    """What decoding counted, a row per prompt; M depths."""

    tokens: Int[np.ndarray, " P"]
    forwards: Int[np.ndarray, " P"]
    cold_starts: Int[np.ndarray, " P"]
    verified: Int[np.ndarray, "P M"]
    accept_probs: Float[np.ndarray, "P M"]  # sums of min(1, p/q) over the verified


@dataclasses.dataclass(frozen=True)
class Consistency:
    """What one method made of one domain's prompts. Intervals are 95 %, over prompts.

    Attributes:
        method: as asked for.
        temperature: of the requests.
        domain: name of the prompts; None for those of all domains together.
        num_prompts: completions.
        num_tokens: generated.
        num_forwards: prefills included.
        num_verified_by_depth: drafts whose fate decided a token, depth 0 first; those behind a refusal are not counted.
        acceptance: introspective acceptance rate, the mean of min(1, p/q) over these; None where nothing is drafted.
        acceptance_by_depth: the same of each depth, so given that the drafts before were accepted; None for a depth
            that was never reached.
        tokens_per_forward: TPF as counted, prefills included.
        predicted: TPF that the acceptance by depth alone implies for completions of these lengths; None where it
            implies none (block diffusion, which verifies nothing, and "auto").
        predicted_long: the same for a completion without end, which the formulas of papers are about.
        cold_share: of the forwards behind the prefill, those that had nothing to verify.
        rows_per_forward: query rows of a forward behind the prefill, padding included; None where they vary ("auto").
        rows_per_token: query rows of the forwards behind the prefill over tokens.
        compute_efficiency: TPF^2 / rows_per_forward, what a query row yields compared with AR's: 1 for AR.
        num_same_as_ar: completions equal to AR's token for token. All of them at temperature 0 in float32.
    """

    method: Method
    temperature: float
    domain: str | None
    num_prompts: int
    num_tokens: int
    num_forwards: int
    num_verified_by_depth: tuple[int, ...]
    acceptance: Estimate | None
    acceptance_by_depth: tuple[Estimate | None, ...]
    tokens_per_forward: Estimate
    predicted: Estimate | None
    predicted_long: Estimate | None
    cold_share: float
    rows_per_forward: int | None
    rows_per_token: float | None
    compute_efficiency: Estimate | None
    num_same_as_ar: int


def measure(
    lm: LanguageModel,
    prompts: Mapping[str, Sequence[Prompt]],
    methods: Sequence[Method],
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    sampling: SamplingParams | None = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> list[Consistency]:
    """Completes every prompt by AR and by every method, and says how consistent the model was.

    Prompt i of all decodes with the seed `sampling.seed` + i, the same for every method.

    Args:
        lm: the model, with or without a gated adapter.
        prompts: by domain; texts or token ids, at least two of each, for with one there is no interval.
        methods: what to measure; AR always comes first.
        temperatures: what to sample at; 0 is greedy.
        sampling: everything else that a request asks.
        batch_size: most requests per compiled loop.
        show_progress: draw a bar on stderr.

    Returns:
        By temperature, then method, then domain in the order given; with several domains, all of them together last.

    Raises:
        ValueError: there are too few prompts, one of them is unusable or too long (the message names its domain and
            place in it), or the model cannot decode by a method.
    """
    sampling = SamplingParams() if sampling is None else sampling
    encoded = _checked(lm, prompts, sampling.max_tokens)
    spans = _spans({domain: len(group) for domain, group in encoded.items()})
    every = [prompt for group in encoded.values() for prompt in group]
    methods = list(dict.fromkeys([AR(), *methods]))
    found = []
    progress = tqdm(total=len(temperatures) * len(methods), unit="method", disable=not show_progress)
    with progress:
        for temperature in temperatures:
            params = [
                dataclasses.replace(sampling, temperature=temperature, seed=(sampling.seed + index) % 2**32)
                for index in range(len(every))
            ]
            reference: list[Completion] = []
            for method in methods:
                completions = generate(lm, every, method, params, batch_size=batch_size)
                reference = reference or completions
                for domain, parts in spans.items():
                    chosen = [completions[at] for part in parts for at in part]
                    ar = [reference[at] for part in parts for at in part]
                    sizes = [len(part) for part in parts]
                    found.append(consistency(method, temperature, domain, chosen, ar, sizes))
                progress.update()
    return found


def consistency(
    method: Method,
    temperature: float,
    domain: str | None,
    completions: Sequence[Completion],
    ar: Sequence[Completion],
    sizes: Sequence[int],
) -> Consistency:
    """The figures of completions that are there already.

    Args:
        method: that made them.
        temperature: of all of them.
        domain: as in the result.
        completions: one per prompt.
        ar: AR's of the same prompts.
        sizes: prompts of each domain among them, one after the other; intervals resample each by itself.
    """
    counted, weights = tally(completions), resampled(sizes)
    tpf = ratio(counted.tokens, counted.forwards, weights)
    assert tpf is not None  # every completion took a forward
    num_decodes = int(counted.forwards.sum()) - len(completions)
    rows = None if len(method.menu) > 1 else method.window_len
    verified, probs = counted.verified, counted.accept_probs
    depths = range(verified.shape[1])
    return Consistency(
        method=method,
        temperature=temperature,
        domain=domain,
        num_prompts=len(completions),
        num_tokens=int(counted.tokens.sum()),
        num_forwards=int(counted.forwards.sum()),
        num_verified_by_depth=tuple(verified.sum(0).tolist()),
        acceptance=ratio(probs.sum(1), verified.sum(1), weights),
        acceptance_by_depth=tuple(ratio(probs[:, depth], verified[:, depth], weights) for depth in depths),
        tokens_per_forward=tpf,
        predicted=predicted(method, counted, weights),
        predicted_long=predicted_long(method, counted, weights),
        cold_share=float(counted.cold_starts.sum()) / max(num_decodes, 1),
        rows_per_forward=rows,
        rows_per_token=None if rows is None else rows * num_decodes / int(counted.tokens.sum()),
        compute_efficiency=None if rows is None else Estimate(*(each**2 / rows for each in dataclasses.astuple(tpf))),
        num_same_as_ar=sum(a.token_ids == b.token_ids for a, b in zip(completions, ar, strict=True)),
    )


def tally(completions: Sequence[Completion]) -> Tally:
    """The counts of completions by one method."""
    return Tally(
        np.array([len(each.token_ids) for each in completions]),
        np.array([each.num_forwards for each in completions]),
        np.array([each.num_cold_starts for each in completions]),
        np.array([each.verified_by_depth for each in completions], np.int64),
        np.array([each.accept_probs_by_depth for each in completions], np.float64),
    )


def predicted(method: Method, counted: Tally, weights: Weights) -> Estimate | None:
    """TPF of completions as long as these, from nothing but their acceptance by depth."""
    if not _follows_chain(method):
        return None
    lengths, which = np.unique(counted.tokens, return_inverse=True)

    def statistic(weights: Weights) -> Float[np.ndarray, " R"]:
        forwards = expected_forwards(_chain(method, counted, weights), lengths)
        return (weights @ counted.tokens) / np.sum(weights * forwards[:, which], axis=1)

    return estimate(statistic, weights)


def predicted_long(method: Method, counted: Tally, weights: Weights) -> Estimate | None:
    """The same of a completion without end."""
    if not _follows_chain(method):
        return None
    return estimate(lambda weights: tokens_per_forward(_chain(method, counted, weights)), weights)


def _follows_chain(method: Method) -> TypeGuard[AR | ISD | TwoPass]:
    return isinstance(method, AR | ISD | TwoPass) and len(method.menu) == 1


def _chain(method: AR | ISD | TwoPass, counted: Tally, weights: Weights) -> Chain:
    acceptance = safe_ratio(weights @ counted.accept_probs, weights @ counted.verified)
    # A depth that no window reached has no say in where windows end.
    return chain_of(np.nan_to_num(acceptance), method)


def _checked(lm: LanguageModel, prompts: Mapping[str, Sequence[Prompt]], max_tokens: int) -> dict[str, list[list[int]]]:
    """Token ids of every prompt."""
    if not prompts:
        raise ValueError("there are no prompts to measure with")
    encoded = {}
    for domain, group in prompts.items():
        if isinstance(group, str):
            raise TypeError(f"the prompts of {domain!r} must be a list; wrap a single text as [text]")
        if len(group) < 2:
            raise ValueError(f"{domain!r} has {len(group)} prompts: an interval over prompts needs at least 2")
        try:
            encoded[domain] = [encode_prompt(lm, prompt, index) for index, prompt in enumerate(group)]
        except ValueError as error:
            raise ValueError(f"{domain!r}: {error}") from None
        for index, ids in enumerate(encoded[domain]):
            if len(ids) + max_tokens > lm.config.max_position:
                raise ValueError(
                    f"{domain!r}: prompt {index} has {len(ids)} tokens and {max_tokens=}: together they exceed the "
                    f"model's {lm.config.max_position} positions"
                )
    return encoded


def _spans(sizes: Mapping[str, int]) -> dict[str | None, list[range]]:
    """Where the prompts of each domain stand among all; under None, where all do."""
    starts = np.cumsum([0, *sizes.values()]).tolist()
    spans = [range(start, stop) for start, stop in itertools.pairwise(starts)]
    found: dict[str | None, list[range]] = {domain: [span] for domain, span in zip(sizes, spans, strict=True)}
    return found if len(spans) == 1 else found | {None: spans}
