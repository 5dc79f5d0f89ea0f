"""Answers in OpenAI's shapes."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from idlm_jax.decoding.generate import TokenLogprob
from serve.handle import EngineError
from serve.http.errors import ApiError
from serve.http.jobs import Delta, Job, Jobs
from serve.http.schemas import ChatRequest

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own stand-in


def usage_of(job: Job) -> dict[str, Any]:
    """Tokens, and under "idlm" what they cost: forwards, cold starts, and drafts by depth."""
    num_tokens = sum(choice.num_tokens for choice in job.choices)
    tallies = [handle.tally for handle in job.handles]
    forwards = sum(handle.num_forwards for handle in job.handles)
    # A prompt is counted once, however many choices it has.
    cached = sum(handle.request.num_cached_tokens for handle in job.handles[:: job.request.n])
    return {
        "prompt_tokens": job.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": job.num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "idlm": {
            "num_forwards": forwards,
            "num_cold_starts": sum(tally.cold_starts for tally in tallies),
            "verified_by_depth": np.sum([tally.verified for tally in tallies], axis=0).tolist(),
            "accepted_by_depth": np.sum([tally.accepted for tally in tallies], axis=0).tolist(),
            "tokens_per_forward": round(num_tokens / max(1, forwards), 3),
        },
    }


async def whole(job: Job, jobs: Jobs) -> dict[str, Any]:
    """The answer to a request that does not stream.

    Raises:
        EngineError: the engine failed under it.
    """
    texts = ["" for _ in job.choices]
    logprobs: list[list[TokenLogprob]] = [[] for _ in job.choices]
    ends: dict[int, Delta] = {}
    async for delta in job.deltas():
        texts[delta.index] += delta.text
        logprobs[delta.index] += delta.logprobs
        if delta.finish_reason is not None:
            ends[delta.index] = delta
    choices = []
    for index, text in enumerate(texts):
        said = {"message": {"role": "assistant", "content": text}} if _is_chat(job) else {"text": text}
        reported = _logprobs(job, jobs, logprobs[index], 0)
        choices.append(_choice(ends[index], said, reported))
    kind = "chat.completion" if _is_chat(job) else "text_completion"
    return _envelope(job, kind, choices) | {"usage": usage_of(job)}


async def events(job: Job, jobs: Jobs) -> AsyncIterator[str]:
    """The answer as server-sent events. An engine that fails says so in the stream, whose status is sent already."""
    kind = "chat.completion.chunk" if _is_chat(job) else "text_completion"
    usage = {"usage": None} if job.request.stream_options.include_usage else {}
    try:
        if _is_chat(job):
            said = {"delta": {"role": "assistant", "content": ""}}
            for choice in job.choices:
                first = _choice(Delta(choice.index, "", [], 0, None, None), said, None)
                yield _event(_envelope(job, kind, [first]) | usage)
        async for delta in job.deltas():
            said = {"delta": {"content": delta.text}} if _is_chat(job) else {"text": delta.text}
            reported = _logprobs(job, jobs, delta.logprobs, delta.text_offset)
            yield _event(_envelope(job, kind, [_choice(delta, said, reported)]) | usage)
        if usage:
            yield _event(_envelope(job, kind, []) | {"usage": usage_of(job)})
    except EngineError as error:
        yield _event(ApiError(500, str(error), code="engine_error").body())
    yield "data: [DONE]\n\n"


def _is_chat(job: Job) -> bool:
    return isinstance(job.request, ChatRequest)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _envelope(job: Job, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model, "choices": list(choices)}


def _choice(delta: Delta, said: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "index": delta.index,
        **said,
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason,
        "matched_stop": delta.matched_stop,
    }


def _logprobs(job: Job, jobs: Jobs, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    if job.request.top_alternatives is None:
        return None
    texts = [jobs.token_text(each.token_id) for each in tokens]
    if _is_chat(job):
        return {
            "content": [
                _entry(text, each.logprob)
                | {"top_logprobs": [_entry(jobs.token_text(token), logprob) for token, logprob in each.top.items()]}
                for text, each in zip(texts, tokens, strict=True)
            ]
        }
    starts = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [max(each.logprob, LEAST_LOGPROB) for each in tokens],
        "top_logprobs": [
            {jobs.token_text(token): max(logprob, LEAST_LOGPROB) for token, logprob in each.top.items()}
            for each in tokens
        ],
        "text_offset": starts,
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character only has no text of its own, and so no bytes that would be its.
    data = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}
