"""`generate`: a list of prompts in, a list of completions out, one compiled loop in between."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from idlm_jax.decoding.auto import run_auto
from idlm_jax.decoding.fixed_width import group_slots_of
from idlm_jax.decoding.loop import programs
from idlm_jax.decoding.method import ISD, BlockDiffusion, Method, StepPlan, check_mask_id, step_plan
from idlm_jax.decoding.pacing import Pacer
from idlm_jax.decoding.prompts import Prompt, encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.shaping import shaping_of
from idlm_jax.decoding.state import DecodeState, Finish, initial_state
from idlm_jax.model.language_model import LanguageModel
from pallas_kernels.verify import Sampling

NO_LIMIT = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one committed token under the causal distribution, and of the likeliest alternatives."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    Attributes:
        token_ids: generated ids, the stop token included.
        text: the same without special tokens; empty when the model has no tokenizer.
        finish_reason: "stop" (a stop or end-of-sequence id) or "length" (`max_tokens` reached).
        num_forwards: forwards the request took part in, the prefill included.
        num_cold_starts: forwards after the prefill that had no draft to verify.
        verified_by_depth: drafts that decided a token, depth 0 first.
        accepted_by_depth: how many of those were accepted.
        accept_probs_by_depth: sum of min(1, p/q) over them.
        acceptance_rate: mean of min(1, p/q) over the verified drafts; nan when there were none (AR).
        logprobs: one entry per token when asked for, else None.
        logit_checksums: with `deterministic="bitwise"`, one number per token: an exact function of the bits of the
            float32 logits that it was decided from (`fixed_width.checksums`).
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    num_forwards: int
    num_cold_starts: int
    verified_by_depth: tuple[int, ...]
    accepted_by_depth: tuple[int, ...]
    accept_probs_by_depth: tuple[float, ...]
    acceptance_rate: float
    logprobs: list[TokenLogprob] | None
    logit_checksums: list[int] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """TPF; exactly 1 for AR."""
        return len(self.token_ids) / self.num_forwards


@dataclasses.dataclass(frozen=True)
class PreparedBatch:
    """A batch on the device, ready for its prefill.

    Attributes:
        plan: of the prefill, and of the forwards behind it unless something is "auto".
        plans: of the method's menu.
        state: donated to the prefill.
        prompt_lens: tokens of each prompt.
        prefill_rows: padded length of the prompts.
    """

    plan: StepPlan
    plans: tuple[StepPlan, ...]
    state: DecodeState
    prompt_lens: list[int]
    prefill_rows: int


def generate(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    method: Method | None = None,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    batch_size: int = 64,
    deterministic: Literal["bitwise"] | None = None,
) -> list[Completion]:
    """Completes every prompt.

    A request's tokens depend on its own prompt, parameters and seed, never on its neighbours. Batches are padded to
    powers of two in requests, prompt length and capacity, so the number of compiled programs stays logarithmic.

    Args:
        lm: the model; its adapter, if any, acts on MASK rows only.
        prompts: texts or lists of token ids.
        method: `AR()` or `ISD(stride=N)`; by default ISD with stride 4. With something "auto", the methods of its menu
            are compiled and timed first, which pays for many prompts or long completions.
        sampling: one for all prompts, or one each. With one for all, equal prompts get equal completions.
        batch_size: most requests in one compiled loop.
        deterministic: "bitwise" gives every committed token the same logits, bit for bit, under AR and ISD of any
            stride, in any batch, with the same weights, device and versions: greedy ISD is AR in bfloat16 too. Slower
            (docs/numerics.md).

    Raises:
        ValueError: a prompt is empty, too long, holds foreign ids or a MASK; the list of sampling parameters has
            another length; ISD is asked of a model without a MASK id; or `deterministic` is unknown or the method's
            window wider than its 16 rows.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list; wrap a single text as [text]")
    group_slots = group_slots_of(deterministic)
    method = ISD() if method is None else method
    sampling = SamplingParams() if sampling is None else sampling
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(prompts):
        raise ValueError(f"{len(params)} sampling parameters for {len(prompts)} prompts")
    encoded = [encode_prompt(lm, prompt, index) for index, prompt in enumerate(prompts)]
    completions = []
    pacer = Pacer(method.menu)
    for first in range(0, len(encoded), batch_size):
        batch, wanted = encoded[first : first + batch_size], params[first : first + batch_size]
        prepared = prepare_batch(lm, batch, method, wanted, group_slots)
        run_prefill, run_loop = programs(prepared.plan)
        state = run_prefill(lm.graph, lm.params, prepared.plan, prepared.state, prepared.prefill_rows)
        if len(prepared.plans) > 1:
            state = run_auto(lm, prepared.plans, pacer, state)
        else:
            state = run_loop(lm.graph, lm.params, prepared.plan, state, jnp.int32(NO_LIMIT))
        completions += read_completions(lm, state, prepared.prompt_lens, wanted)
    return completions


def prepare_batch(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    method: Method,
    params: Sequence[SamplingParams],
    group_slots: int | None = None,
) -> PreparedBatch:
    """Checks lengths, pads to buckets and moves a batch to the device; `group_slots` as in `StepPlan`.

    Raises:
        ValueError: prompt plus `max_tokens` exceeds the model's positions, a bias names an id outside the vocabulary,
            the model has no MASK id for ISD, or the window is too wide for the bit-for-bit mode.
    """
    config = lm.config
    check_mask_id(method, config.mask_token_id)
    for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        if len(prompt) + wanted.max_tokens > config.max_position:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and max_tokens={wanted.max_tokens}: together they exceed "
                f"the model's {config.max_position} positions"
            )
    if isinstance(method, BlockDiffusion) and any(wanted.is_shaped for wanted in params):
        raise ValueError("BlockDiffusion knows no penalties, biases or floors: they ask what stands before a token")
    prompt_lens = [len(prompt) for prompt in prompts]
    ends = [length + wanted.max_tokens for length, wanted in zip(prompt_lens, params, strict=True)]
    slots = bucket(len(prompts), smallest=group_slots or 1)  # a whole number of groups
    prefill_rows = bucket(max(prompt_lens), smallest=16)
    capacity = bucket(max(max(ends), prefill_rows), smallest=64)
    tokens = np.zeros((slots, capacity), np.int32)
    for slot, prompt in enumerate(prompts):
        tokens[slot, : len(prompt)] = prompt
    stops = [set(wanted.stop_token_ids) | set(() if wanted.ignore_eos else config.eos_token_ids) for wanted in params]
    stop_ids = np.full((slots, bucket(max(map(len, stops)), smallest=4)), -1, np.int32)
    for slot, stop in enumerate(stops):
        stop_ids[slot, : len(stop)] = sorted(stop)

    def column(values: Sequence[float | int], fill: float | int, dtype: type) -> np.ndarray:
        return np.array([*values, *[fill] * (slots - len(values))], dtype)

    sampling = Sampling(
        temperature=jnp.asarray(column([p.temperature for p in params], 0.0, np.float32)),
        top_k=jnp.asarray(column([p.top_k for p in params], 0, np.int32)),
        top_p=jnp.asarray(column([p.top_p for p in params], 1.0, np.float32)),
        seed=jnp.asarray(column([p.seed for p in params], 0, np.uint32)),
    )
    plans = tuple(
        step_plan(
            each,
            config.mask_token_id,
            # A greedy request has nothing to filter.
            filtered=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0) for p in params),
            all_greedy=all(p.temperature == 0 for p in params),
            num_top_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            group_slots=group_slots,
        )
        for each in method.menu
    )
    # The most drafts; a prefill has one group of MASKs whatever the rows.
    plan = max(plans, key=lambda each: each.num_masks)
    # Padding slots: one-token prompts with no budget, done before they start.
    state = initial_state(
        config,
        plan,
        tokens,
        column(prompt_lens, 1, np.int32),
        column(ends, 1, np.int32),
        stop_ids,
        sampling,
        shaping=shaping_of(params, prompts, slots, config.vocab_size),
        written_rows=max(each.written_rows for each in plans),
        keeps_confidence=any(each.places_masks for each in plans),
    )
    return PreparedBatch(plan, plans, state, prompt_lens, prefill_rows)


def bucket(size: int, *, smallest: int) -> int:
    """The smallest power of two that holds `size`, and at least `smallest`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def decode_text(lm: LanguageModel, token_ids: list[int]) -> str:
    """Text without special tokens; empty without a tokenizer."""
    # The cast: `decode` also takes batches, for which it would return a list.
    return "" if lm.tokenizer is None else str(lm.tokenizer.decode(token_ids, skip_special_tokens=True))


def read_completions(
    lm: LanguageModel, state: DecodeState, prompt_lens: list[int], params: Sequence[SamplingParams]
) -> list[Completion]:
    """Fetches a finished batch and describes each request."""
    tokens, context_len, finish, counts, recorded, checksums = jax.device_get(
        (state.tokens, state.context_len, state.finish, state.counts, state.logprobs, state.checksums)
    )
    completions = []
    for slot, (prompt_len, wanted) in enumerate(zip(prompt_lens, params, strict=True)):
        span = slice(prompt_len, int(context_len[slot]) + 1)
        token_ids = tokens[slot, span].tolist()
        logprobs = None
        if wanted.logprobs is not None:
            logprobs = [
                TokenLogprob(token, float(recorded.chosen[slot, at]), dict(zip(ids, values, strict=True)))
                for token, at, ids, values in zip(
                    token_ids,
                    range(prompt_len, span.stop),
                    recorded.top_ids[slot, span, : wanted.logprobs].tolist(),
                    recorded.top[slot, span, : wanted.logprobs].tolist(),
                    strict=True,
                )
            ]
        verified = int(counts.verified[slot].sum())
        completions.append(
            Completion(
                token_ids=token_ids,
                text=decode_text(lm, token_ids),
                finish_reason="stop" if finish[slot] == Finish.STOP else "length",
                num_forwards=int(counts.forwards[slot]),
                num_cold_starts=int(counts.cold_starts[slot]),
                verified_by_depth=tuple(counts.verified[slot].tolist()),
                accepted_by_depth=tuple(counts.accepted[slot].tolist()),
                accept_probs_by_depth=tuple(counts.accept_prob[slot].tolist()),
                acceptance_rate=float(counts.accept_prob[slot].sum()) / verified if verified else float("nan"),
                logprobs=logprobs,
                logit_checksums=None if checksums is None else checksums[slot, span].tolist(),
            )
        )
    return completions
