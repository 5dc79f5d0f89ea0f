"""`generate_stream`: text as it is committed, for one prompt."""

from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from tokenizers.decoders import DecodeStream

from idlm_jax.decoding.auto import stretches
from idlm_jax.decoding.fixed_width import group_slots_of
from idlm_jax.decoding.generate import prepare_batch
from idlm_jax.decoding.loop import programs
from idlm_jax.decoding.method import ISD, Method
from idlm_jax.decoding.pacing import Pacer
from idlm_jax.decoding.prompts import Prompt, encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.state import DecodeState, Finish
from idlm_jax.model.language_model import LanguageModel


def stream_tokens(
    lm: LanguageModel,
    prompt: Prompt,
    method: Method | None = None,
    sampling: SamplingParams | None = None,
    *,
    deterministic: Literal["bitwise"] | None = None,
) -> Iterator[list[int]]:
    """The ids that each forward commits, one non-empty list per forward; drafts are never seen.

    Together they equal what `generate` returns for the same arguments.
    """
    ids = encode_prompt(lm, prompt, 0)
    sent = len(ids)
    for state in states(lm, ids, method, sampling, deterministic=deterministic):
        # Read before the state is donated to the next forward.
        committed = int(state.context_len[0]) + 1
        yield np.asarray(state.tokens[0, sent:committed]).tolist()
        sent = committed


def states(
    lm: LanguageModel,
    prompt: list[int],
    method: Method | None = None,
    sampling: SamplingParams | None = None,
    *,
    deterministic: Literal["bitwise"] | None = None,
) -> Iterator[DecodeState]:
    """The state of one request after its prefill and after each forward: read it before asking for the next.

    The next forward takes the buffers of the state that was yielded before it.
    """
    sampling = SamplingParams() if sampling is None else sampling
    method = ISD() if method is None else method
    prepared = prepare_batch(lm, [prompt], method, [sampling], group_slots_of(deterministic))
    run_prefill, run_loop = programs(prepared.plan)
    state = run_prefill(lm.graph, lm.params, prepared.plan, prepared.state, prepared.prefill_rows)
    yield state
    if len(prepared.plans) > 1:
        yield from stretches(lm, prepared.plans, Pacer(method.menu), state, longest=1)
        return
    while int(state.finish[0]) == Finish.RUNNING:
        state = run_loop(lm.graph, lm.params, prepared.plan, state, jnp.int32(1))
        yield state


def generate_stream(
    lm: LanguageModel,
    prompt: Prompt,
    method: Method | None = None,
    sampling: SamplingParams | None = None,
    *,
    deterministic: Literal["bitwise"] | None = None,
) -> Iterator[str]:
    """Text pieces as they are committed; joined they are the completion's text.

    A piece is held back while it ends inside a UTF-8 character.

    Raises:
        ValueError: the model has no tokenizer (use `stream_tokens`), or the prompt is refused as by `generate`.
    """
    if lm.tokenizer is None:
        raise ValueError("generate_stream needs a tokenizer, and the model folder has none: use stream_tokens")
    decoder = DecodeStream(skip_special_tokens=True)
    backend: Any = lm.tokenizer.backend_tokenizer
    for ids in stream_tokens(lm, prompt, method, sampling, deterministic=deterministic):
        text = "".join(decoder.step(backend, token) or "" for token in ids)
        if text:
            yield text
