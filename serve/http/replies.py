"""Answers in OpenAI's shapes."""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from idlm_jax.decoding.generate import TokenLogprob
from serve.handle import EngineError
from serve.http.choice import Delta
from serve.http.errors import ApiError
from serve.http.jobs import Job, Jobs
from serve.http.message import Part, joined
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
        "completion_tokens_details": {"reasoning_tokens": sum(each.num_reasoning_tokens for each in job.choices)},
        "idlm": {
            "num_forwards": forwards,
            "num_cold_starts": sum(tally.cold_starts for tally in tallies),
            "verified_by_depth": np.sum([tally.verified for tally in tallies], axis=0).tolist(),
            "accepted_by_depth": np.sum([tally.accepted for tally in tallies], axis=0).tolist(),
            "tokens_per_forward": round(num_tokens / max(1, forwards), 3),
        },
    }


def meta_info_of(job: Job) -> dict[str, Any]:
    """Where clients made for SGLang look for tokens per forward."""
    num_tokens = sum(choice.num_tokens for choice in job.choices)
    forwards = sum(handle.tally.forwards for handle in job.handles)
    return {
        "id": job.id,
        "prompt_tokens": job.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "spec_verify_ct": forwards,
        "spec_accept_length": round(num_tokens / max(1, forwards), 3),
    }


async def whole(job: Job, jobs: Jobs) -> dict[str, Any]:
    """The answer to a request that does not stream.

    Raises:
        EngineError: the engine failed under it.
    """
    parts: list[list[Part]] = [[] for _ in job.choices]
    logprobs: list[list[TokenLogprob]] = [[] for _ in job.choices]
    ends: dict[int, Delta] = {}
    async for delta in job.deltas():
        parts[delta.index] += delta.parts
        logprobs[delta.index] += delta.logprobs
        if delta.finish_reason is not None:
            ends[delta.index] = delta
    choices = []
    for choice in job.choices:
        said = joined(parts[choice.index])
        body = {"message": _message(said)} if _is_chat(job) else {"text": choice.echo + _text(said, "content")}
        choices.append(_choice(ends[choice.index], body, _logprobs(job, jobs, logprobs[choice.index], 0)))
    kind = "chat.completion" if _is_chat(job) else "text_completion"
    return _envelope(job, kind, choices) | {"usage": usage_of(job), "meta_info": meta_info_of(job)}


async def events(job: Job, jobs: Jobs) -> AsyncIterator[str]:
    """The answer as server-sent events. An engine that fails says so in the stream, whose status is sent already."""
    kind = "chat.completion.chunk" if _is_chat(job) else "text_completion"
    usage = {"usage": None} if job.request.stream_options.include_usage else {}
    num_calls = [0 for _ in job.choices]
    try:
        for choice in job.choices:
            if _is_chat(job) or choice.echo:
                said = {"delta": {"role": "assistant", "content": ""}} if _is_chat(job) else {"text": choice.echo}
                yield _event(_envelope(job, kind, [_choice(Delta(choice.index), said, None)]) | usage)
        async for delta in job.deltas():
            # Calls are told one step at a time, as OpenAI does, so one delta may take several chunks.
            chunks = _told(delta.parts, num_calls, delta.index) if _is_chat(job) else [_text_of(delta)]
            for place, said in enumerate(chunks):
                is_first, is_last = place == 0, place == len(chunks) - 1
                end = delta if is_last else Delta(delta.index)
                reported = _logprobs(job, jobs, delta.logprobs, delta.text_offset) if is_first else None
                counted = {"idlm": {"num_tokens": delta.num_tokens}} if is_first and delta.num_tokens else {}
                yield _event(_envelope(job, kind, [_choice(end, said, reported)]) | usage | counted)
        if usage:
            yield _event(_envelope(job, kind, []) | {"usage": usage_of(job), "meta_info": meta_info_of(job)})
    except EngineError as error:
        yield _event(ApiError(500, str(error), code="engine_error").body())
    yield "data: [DONE]\n\n"


def _text(parts: Sequence[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def _text_of(delta: Delta) -> dict[str, Any]:
    return {"text": _text(delta.parts, "content")}


def _message(parts: Sequence[Part]) -> dict[str, Any]:
    """The whole message of an assistant."""
    content, thoughts = _text(parts, "content"), _text(parts, "reasoning")
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.kind == "call":
            calls.append(_call(part.text))
        elif part.kind == "arguments":
            calls[-1]["function"]["arguments"] += part.text
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thoughts or calls:
        message |= {"content": content or None}
    if thoughts:
        message |= {"reasoning_content": thoughts}
    return message | ({"tool_calls": calls} if calls else {})


def _call(name: str) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": {"name": name, "arguments": ""}}


def _told(parts: Sequence[Part], num_calls: list[int], index: int) -> list[dict[str, Any]]:
    """The news of a message, one chunk per part, and one without news if there is none."""
    chunks: list[dict[str, Any]] = []
    for part in parts:
        match part.kind:
            case "content":
                chunks.append({"content": part.text})
            case "reasoning":
                chunks.append({"reasoning_content": part.text})
            case "call":
                chunks.append({"tool_calls": [{"index": num_calls[index]} | _call(part.text)]})
                num_calls[index] += 1
            case "arguments":
                call = {"index": num_calls[index] - 1, "function": {"arguments": part.text}}
                chunks.append({"tool_calls": [call]})
    return [{"delta": chunk} for chunk in chunks or [{"content": ""}]]


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
