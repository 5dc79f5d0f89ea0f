"""One HTTP request as engine requests: started together, read as one stream of deltas, stopped together."""

import asyncio
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from idlm_jax.decoding.generate import TokenLogprob
from idlm_jax.decoding.prompts import encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import LanguageModel
from serve.engine import Engine
from serve.handle import EngineError, FinishReason, Piece, RequestHandle
from serve.http.errors import ApiError
from serve.http.metrics import Latencies
from serve.http.prompts import encode_chat
from serve.http.schemas import ChatRequest, CompletionRequest, SamplingBody
from serve.http.text import TextStream
from serve.scheduler import QueueFull

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of one choice.

    Attributes:
        index: of the choice.
        text: new text; never taken back.
        logprobs: of the tokens that came with it; the text of some may be held back.
        text_offset: characters of this choice's tokens before those of `logprobs`.
        finish_reason: set once, with the last delta.
        matched_stop: the stop string or token id that ended it.
    """

    index: int
    text: str
    logprobs: list[TokenLogprob]
    text_offset: int
    finish_reason: FinishReason | None
    matched_stop: str | int | None


class Choice:
    """One completion under way."""

    def __init__(self, index: int, text: TextStream, token_text: Callable[[int], str]):
        self.index, self.num_tokens = index, 0
        self.finish_reason: FinishReason | None = None
        self._text, self._token_text = text, token_text
        self._text_offset = 0

    def take(self, piece: Piece) -> Delta:
        """The news in a piece. The token or string that ends a choice is counted, and not shown."""
        reason, matched, text, num_taken = piece.finish_reason, None, "", 0
        for token in piece.token_ids:
            num_taken += 1
            if reason == "stop" and num_taken == len(piece.token_ids):
                matched = token
                break
            text += self._text.push(token)
            if self._text.matched is not None:
                reason = "stop"
                break
        if reason is not None:
            text += self._text.finish()
            if self._text.matched is not None:
                reason, matched = "stop", self._text.matched
        self.num_tokens += num_taken
        self.finish_reason = reason
        logprobs = (piece.logprobs or [])[:num_taken]
        delta = Delta(self.index, text, logprobs, self._text_offset, reason, matched)
        self._text_offset += sum(len(self._token_text(each.token_id)) for each in logprobs)
        return delta


class Job:
    """The choices of one HTTP request."""

    def __init__(self, job_id: str, request: SamplingBody, model: str, latencies: Latencies):
        self.id, self.request, self.model = job_id, request, model
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.handles: list[RequestHandle] = []
        self.num_prompt_tokens = self.num_cached_tokens = 0
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._latencies = latencies

    def deliver_to(self, index: int) -> Callable[[Piece], None]:
        """What the engine's thread calls with pieces of one choice."""

        def deliver(piece: Piece) -> None:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return deliver

    def abort(self) -> None:
        """Ends what is still running. The callers of `deltas` see the reason "abort"."""
        for choice, handle in zip(self.choices, self.handles, strict=False):
            if choice.finish_reason is None:
                handle.abort()

    async def deltas(self) -> AsyncIterator[Delta]:
        """News of all choices as they come, until all are finished.

        Raises:
            EngineError: the engine failed under one of them.
        """
        clocks = [self._latencies.start() for _ in self.choices]
        while any(choice.finish_reason is None for choice in self.choices):
            index, piece = await self._pieces.get()
            choice = self.choices[index]
            if choice.finish_reason is not None:
                continue  # committed before the engine heard that a stop string has ended it
            if piece.finish_reason == "error":
                raise EngineError(piece.error)
            clocks[index].tick(len(piece.token_ids))
            delta = choice.take(piece)
            if delta.finish_reason is not None:
                clocks[index].stop()
                if piece.finish_reason is None:
                    self.handles[index].abort()
            if delta.text or delta.logprobs or delta.finish_reason is not None:
                yield delta


class Jobs:
    """Starts jobs and knows those that run."""

    def __init__(self, engine: Engine, lm: LanguageModel, max_len: int, latencies: Latencies):
        """Args: `max_len` is the engine's longest request."""
        assert lm.tokenizer is not None
        self.running: dict[str, Job] = {}
        self.failure: str | None = None  # why the engine takes no requests any more
        self._engine, self._lm, self._max_len, self._latencies = engine, lm, max_len, latencies
        self._tokenizer = lm.tokenizer
        # A long prompt takes a while, and others stream meanwhile. One thread: tokenizers may not be shared.
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def start(self, request: CompletionRequest | ChatRequest, model: str) -> Job:
        """Tokenizes and submits.

        Raises:
            ApiError: the request cannot be served, or not now.
        """
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        job = Job(request.rid or f"{prefix}-{uuid.uuid4().hex}", request, model, self._latencies)
        if job.id in self.running:
            raise ApiError(400, f"rid={job.id!r} is in use", param="rid")
        self.running[job.id] = job
        try:
            await self.tokenize(lambda: self._submit(job))
        except BaseException:
            self.close(job)
            raise
        return job

    def close(self, job: Job) -> None:
        """Forgets a job, and ends it if it still runs."""
        job.abort()
        self.running.pop(job.id, None)

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Runs `work` where tokenizers are used."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def token_text(self, token_id: int) -> str:
        """One token by itself; part of a character shows as a replacement."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _submit(self, job: Job) -> None:
        request = job.request
        try:
            for prompt in self._encode(request):
                params = self._params(request, len(prompt))
                job.num_prompt_tokens += len(prompt)
                for repetition in range(request.n):
                    index = len(job.choices)
                    text = TextStream(self._tokenizer, request.stop_strings, skips_special=request.skip_special_tokens)
                    job.choices.append(Choice(index, text, self.token_text))
                    sampling = dataclasses.replace(params, seed=(params.seed + repetition) % 2**32)
                    job.handles.append(self._engine.submit(prompt, sampling, deliver=job.deliver_to(index)))
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full") from error
        except EngineError as error:
            self.failure = str(error)
            raise ApiError(503, str(error), code="unavailable") from error
        except ValueError as error:
            code = "context_length_exceeded" if "exceed" in str(error) else "invalid_value"
            raise ApiError(400, str(error).removeprefix("self."), code=code) from error

    def _encode(self, request: SamplingBody) -> Sequence[list[int]]:
        if isinstance(request, ChatRequest):
            return [encode_chat(self._lm, request.messages, request.chat_template_kwargs)]
        assert isinstance(request, CompletionRequest)
        if not request.prompts:
            raise ApiError(400, "prompt is an empty list", param="prompt")
        return [encode_prompt(self._lm, prompt, index) for index, prompt in enumerate(request.prompts)]

    def _params(self, request: SamplingBody, prompt_len: int) -> SamplingParams:
        vocab_size = self._lm.config.vocab_size
        outside = [token for token in request.stop_token_ids if token >= vocab_size]
        if outside:
            raise ApiError(400, f"stop_token_ids {outside[:5]} lie outside the vocabulary", param="stop_token_ids")
        room = max(1, self._max_len - prompt_len)
        return SamplingParams(
            max_tokens=room if request.most_tokens is None else request.most_tokens,
            temperature=request.temperature,
            top_k=min(max(request.top_k, 0), vocab_size),
            top_p=request.top_p,
            # Any integer is a seed; without one every request is different.
            seed=secrets.randbits(32) if request.seed is None else request.seed % 2**32,
            stop_token_ids=tuple(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=request.top_alternatives,
        )
