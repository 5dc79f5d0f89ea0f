"""Statistics of runs. What failed has no times, and what was interrupted counts only where nothing was completed."""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from serve.bench.client import Answer
from serve.bench.rounds import WARM_UP, Run


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Over requests. Percentiles interpolate linearly between the two nearest."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclasses.dataclass(frozen=True)
class Spread:
    """Over rounds."""

    median: float
    min: float
    max: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
    """What a load on a target came to, over the counted rounds together.

    Attributes:
        load: label.
        target: name.
        is_complete: False if only an interrupted run could be used.
        num_answers: requests that ended well.
        num_failures: by kind, in the counted rounds.
        requests_per_s: of each round; None without an answer, as all below.
        tokens_per_s: output tokens of each round.
        ttft_s: time to first token.
        tpot_s: time per output token after the first; None also if no answer had two tokens.
        latency_s: of the whole request.
        prompt_tokens: mean per request.
        cached_share: of prompt tokens that the server remembered.
        completion_tokens: mean per request.
        tokens_per_forward: None from servers that do not count forwards.
        acceptance_by_depth: share of the checked drafts that was kept; None as above.
        client_cpu_share: of one core, used by the load generator.
        client_s_per_chunk: its processor time per streamed chunk.
        late_s: the latest that a request was sent.
    """

    load: str
    target: str
    is_complete: bool
    num_answers: int
    num_failures: dict[str, int]
    requests_per_s: Spread | None
    tokens_per_s: Spread | None
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    latency_s: Distribution | None
    prompt_tokens: float | None
    cached_share: float | None
    completion_tokens: float | None
    tokens_per_forward: float | None
    acceptance_by_depth: list[float] | None
    client_cpu_share: float | None
    client_s_per_chunk: float | None
    late_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratios:
    """A target over the baseline, each round by itself. None where no round has both."""

    load: str
    target: str
    num_rounds: int
    tokens_per_s: Spread | None
    ttft: Spread | None
    tpot: Spread | None
    latency: Spread | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextComparison:
    """Completions of a target beside the baseline's, request by request.

    Attributes:
        load: label.
        target: name.
        num_compared: pairs in which both ended well, warm-up included.
        num_different: of them.
        first_difference: round, prompt and the two texts of one.
    """

    load: str
    target: str
    num_compared: int
    num_different: int
    first_difference: tuple[int, int, str, str] | None


def distribution(values: Sequence[float]) -> Distribution | None:
    """None of nothing."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Distribution(statistics.fmean(values), p50, p90, p99)


def spread(values: Sequence[float]) -> Spread | None:
    """None of nothing."""
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def measure(runs: Sequence[Run]) -> list[Measures]:
    """One for every load and target, in the order in which they were first asked after the warm-up."""
    groups = _counted(runs)
    return [_measure(load, target, group) for (load, target), group in groups.items()]


def compare(runs: Sequence[Run], baseline: str) -> list[Ratios]:
    """Ratios of every other target to `baseline`, from rounds that both completed."""
    groups = _counted(runs)
    found = []
    for (load, target), group in groups.items():
        if target == baseline:
            continue
        base = {run.round: run for run in groups.get((load, baseline), []) if run.is_complete}
        pairs = [(run, base[run.round]) for run in group if run.is_complete and run.round in base]

        def over(value: Callable[[Run], float | None], pairs=pairs) -> Spread | None:
            both = [(value(run), value(other)) for run, other in pairs]
            return spread([a / b for a, b in both if a is not None and b])

        found.append(
            Ratios(
                load=load,
                target=target,
                num_rounds=len(pairs),
                tokens_per_s=over(_tokens_per_s),
                ttft=over(lambda run: _mean([each.ttft_s for each in run.answers])),
                tpot=over(lambda run: _mean([each.tpot_s for each in run.answers])),
                latency=over(lambda run: _mean([each.latency_s for each in run.answers])),
            )
        )
    return found


def compare_texts(runs: Sequence[Run], baseline: str) -> list[TextComparison]:
    """Compares the completions of every other target with those of `baseline`."""
    texts = {
        (run.load, run.target, run.round, answer.number): answer.text
        for run in runs
        for answer in run.answers  # also of interrupted runs and warm-ups: a text is a text
    }
    found = []
    for load, target in dict.fromkeys((run.load, run.target) for run in runs if run.target != baseline):
        num_compared, different = 0, []
        for run in runs:
            if (run.load, run.target) != (load, target):
                continue
            for answer in run.answers:
                other = texts.get((load, baseline, run.round, answer.number))
                num_compared += other is not None
                if other is not None and other != answer.text:
                    different.append((run.round, run.first + answer.number, answer.text, other))
        found.append(
            TextComparison(
                load=load,
                target=target,
                num_compared=num_compared,
                num_different=len(different),
                first_difference=different[0] if different else None,
            )
        )
    return found


def _counted(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.round != WARM_UP:
            groups.setdefault((run.load, run.target), []).append(run)
    return {key: [run for run in group if run.is_complete] or group for key, group in groups.items()}


def _measure(load: str, target: str, runs: Sequence[Run]) -> Measures:
    answers = [answer for run in runs for answer in run.answers]
    rates = [(run, rate) for run in runs if (rate := _tokens_per_s(run)) is not None]
    forwards = [answer.num_forwards for answer in answers]
    counted = [number for number in forwards if number is not None]
    num_prompt = sum(answer.prompt_tokens for answer in answers)
    num_output = sum(answer.completion_tokens for answer in answers)
    num_chunks = sum(answer.num_chunks for answer in answers)
    seconds, cpu_s = sum(run.seconds for run in runs), sum(run.client_cpu_s for run in runs)
    return Measures(
        load=load,
        target=target,
        is_complete=all(run.is_complete for run in runs),
        num_answers=len(answers),
        num_failures=dict(collections.Counter(failure.kind for run in runs for failure in run.failures)),
        requests_per_s=spread([len(run.answers) / run.seconds for run, _ in rates]),
        tokens_per_s=spread([rate for _, rate in rates]),
        ttft_s=distribution([answer.ttft_s for answer in answers]),
        tpot_s=distribution([answer.tpot_s for answer in answers if answer.tpot_s is not None]),
        latency_s=distribution([answer.latency_s for answer in answers]),
        prompt_tokens=num_prompt / len(answers) if answers else None,
        cached_share=sum(answer.cached_tokens for answer in answers) / num_prompt if num_prompt else None,
        completion_tokens=num_output / len(answers) if answers else None,
        tokens_per_forward=num_output / sum(counted) if sum(counted) and len(counted) == len(answers) else None,
        acceptance_by_depth=_acceptance(answers),
        client_cpu_share=cpu_s / seconds if seconds else None,
        client_s_per_chunk=cpu_s / num_chunks if num_chunks else None,
        late_s=max((answer.late_s for answer in answers), default=None),
    )


def _acceptance(answers: Sequence[Answer]) -> list[float] | None:
    depths = max((len(answer.verified_by_depth) for answer in answers), default=0)
    verified, accepted = [0] * depths, [0] * depths
    for answer in answers:
        for depth, (num_verified, num_accepted) in enumerate(
            zip(answer.verified_by_depth, answer.accepted_by_depth, strict=True)
        ):
            verified[depth] += num_verified
            accepted[depth] += num_accepted
    # A draft is checked only if the one before it was kept, so zeros come last.
    return [kept / checked for kept, checked in zip(accepted, verified, strict=True) if checked] or None


def _tokens_per_s(run: Run) -> float | None:
    return sum(answer.completion_tokens for answer in run.answers) / run.seconds if run.answers else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
