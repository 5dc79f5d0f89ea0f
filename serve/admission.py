"""What a request must be before it may wait: everything that can be refused is refused here, in the caller's thread."""

from typing import NamedTuple

import numpy as np

from idlm_jax.decoding.prompts import Prompt, encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.shaping import check_bias
from idlm_jax.model.language_model import LanguageModel
from serve.config import EngineConfig
from serve.grammar import Constraint, Matcher
from serve.packing import Layout, sampling_words
from serve.requests import Request
from serve.scheduler import Scheduler


class Admitted(NamedTuple):
    """A request that fits, as the scheduler, the device and its grammar know it.

    Attributes:
        request: not queued yet.
        words: what the device is told of its sampling parameters.
        constraint: None without a grammar.
    """

    request: Request
    words: np.ndarray
    constraint: Constraint | None


def admit(
    lm: LanguageModel,
    config: EngineConfig,
    layout: Layout,
    scheduler: Scheduler,
    prompt: Prompt,
    params: SamplingParams,
    matcher: Matcher | None,
) -> Admitted:
    """Checks a request against what was compiled.

    Raises:
        ValueError: the prompt or the parameters are out of bounds.
    """
    ids = encode_prompt(lm, prompt, 0)
    if params.logprobs is not None:
        most = config.max_logprobs
        if most is None or params.logprobs > most:
            allowed = "no log-probabilities" if most is None else f"at most {most} alternatives"
            raise ValueError(f"{params.logprobs=}: this engine reports {allowed}")
    if params.is_shaped and not config.shapes:
        raise ValueError("this engine serves no biases, penalties, min_p or min_tokens")
    check_bias(params, lm.config.vocab_size)
    constraint = None if matcher is None else _constrain(config, layout, matcher, params)
    stop_ids = sorted({*params.stop_token_ids, *(() if params.ignore_eos else lm.config.eos_token_ids)})
    if len(stop_ids) > layout.num_stop_ids:
        raise ValueError(f"{len(stop_ids)} stop ids, but at most {layout.num_stop_ids} fit")
    scheduler.check_fits(len(ids), params.max_tokens)
    request = Request(
        ids,
        params.max_tokens,
        is_stepwise=constraint is not None,
        reads_whole_prompt=params.counts_tokens,
        has_pending=scheduler.limits.block_length is None,
    )
    return Admitted(request, sampling_words(layout, params, len(ids), request.end, stop_ids), constraint)


def _constrain(config: EngineConfig, layout: Layout, matcher: Matcher, params: SamplingParams) -> Constraint:
    if not config.shapes:
        raise ValueError("this engine serves no grammars")
    if params.ignore_eos or params.min_tokens:
        # A text that its grammar calls complete has one continuation, its end.
        raise ValueError("a grammar goes with neither ignore_eos nor min_tokens")
    return Constraint(matcher, layout.num_masks)
