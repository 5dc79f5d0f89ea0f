"""One HTTP request as engine requests: started together, read as one stream of deltas, stopped together."""

import asyncio
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from idlm_jax.decoding.prompts import encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import LanguageModel
from serve.engine import Engine
from serve.grammar import Grammars, Matcher
from serve.handle import EngineError, Piece, RequestHandle
from serve.http.choice import Choice, Delta
from serve.http.constraints import calls_constraint, grammar_text
from serve.http.errors import ApiError
from serve.http.metrics import Latencies
from serve.http.prompts import Prompt, encode_chat
from serve.http.reasoning import Reasoning
from serve.http.schemas import ChatRequest, CompletionRequest, SamplingBody
from serve.http.text import TextStream
from serve.http.tools import Calls
from serve.official import Defaults
from serve.scheduler import QueueFull

T = TypeVar("T")


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
            if delta.parts or delta.logprobs or delta.finish_reason is not None:
                yield delta


class Jobs:
    """Starts jobs and knows those that run."""

    def __init__(self, engine: Engine, lm: LanguageModel, defaults: Defaults, latencies: Latencies):
        """Args: `defaults` are for requests that do not say how to sample."""
        assert lm.tokenizer is not None
        self.running: dict[str, Job] = {}
        self._engine, self._lm, self._defaults, self._latencies = engine, lm, defaults, latencies
        self._tokenizer = lm.tokenizer
        self._grammars: Grammars | None = None
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
            for prompt in self._prompts(request):
                params = self._params(request, len(prompt.token_ids))
                job.num_prompt_tokens += len(prompt.token_ids)
                for repetition in range(request.n):
                    choice = self._choice(len(job.choices), request, prompt)
                    job.choices.append(choice)
                    sampling = dataclasses.replace(params, seed=(params.seed + repetition) % 2**32)
                    job.handles.append(
                        self._engine.submit(
                            prompt.token_ids,
                            sampling,
                            matcher=self._matcher(request, prompt),
                            deliver=job.deliver_to(choice.index),
                        )
                    )
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full") from error
        except EngineError as error:
            raise ApiError(503, str(error), code="unavailable") from error
        except ValueError as error:
            code = "context_length_exceeded" if "exceed" in str(error) else "invalid_value"
            raise ApiError(400, str(error).removeprefix("self."), code=code) from error
        except RuntimeError as error:
            # A grammar compiled, and then had no first token.
            field = "tools" if request.constraint is None else request.constraint.field
            reason = str(error).splitlines()[0]
            raise ApiError(400, f"{field}: {reason}", param=field, code="invalid_value") from error

    def _prompts(self, request: SamplingBody) -> Sequence[Prompt]:
        if isinstance(request, ChatRequest):
            return [encode_chat(self._lm, request.messages, request.offered, request.chat_template_kwargs)]
        assert isinstance(request, CompletionRequest)
        if not request.prompts:
            raise ApiError(400, "prompt is an empty list", param="prompt")
        return [Prompt(encode_prompt(self._lm, prompt, index)) for index, prompt in enumerate(request.prompts)]

    def _choice(self, index: int, request: SamplingBody, prompt: Prompt) -> Choice:
        text = TextStream(
            self._tokenizer,
            request.stop_strings,
            skips_special=request.skip_special_tokens,
            min_tokens=request.min_tokens,
        )
        if isinstance(request, ChatRequest):
            names = [tool.function.name for tool in request.offered]
            reasoning = Reasoning(prompt.thinking) if request.separate_reasoning else None
            calls = Calls(names, is_certain=bool(request.demanded)) if names else None
            return Choice(index, text, self.token_text, reasoning=reasoning, calls=calls)
        assert isinstance(request, CompletionRequest)
        echo = ""
        if request.echo:
            given = request.prompts[index // request.n]
            echo = given if isinstance(given, str) else str(self._tokenizer.decode(given))
        return Choice(index, text, self.token_text, echo=echo)

    def _matcher(self, request: SamplingBody, prompt: Prompt) -> Matcher | None:
        """A new place in the grammar that the request asks for, if it does."""
        demands = [] if request.constraint is None else [request.constraint]
        if isinstance(request, ChatRequest) and request.offered and (request.demanded or demands):
            # A model that is free to call writes calls, or else an answer of the form that is asked for.
            functions = [tool.function for tool in request.demanded or request.offered]
            demands.append(calls_constraint(functions, self._tokenizer, many=request.parallel_tool_calls))
        if not demands:
            return None
        field = demands[0].field
        if request.ignore_eos or request.min_tokens:
            name = "ignore_eos" if request.ignore_eos else "min_tokens"
            raise ApiError(400, f"{name} cannot be met together with {field}", param=name)
        if self._grammars is None:
            config = self._lm.config
            self._grammars = Grammars(self._tokenizer, config.vocab_size, config.eos_token_ids)
        try:
            thinking = prompt.thinking if prompt.may_think else "behind"
            return self._grammars.matcher(grammar_text(demands, thinking, self._tokenizer))
        except ValueError as error:
            raise ApiError(400, f"{field}: {error}", param=field, code="invalid_value") from error

    def _params(self, request: SamplingBody, prompt_len: int) -> SamplingParams:
        biases = {int(token): bias for token, bias in request.logit_bias.items()}
        self._check_ids("stop_token_ids", request.stop_token_ids)
        self._check_ids("logit_bias", biases)
        room = max(1, self._engine.longest_request - prompt_len)
        said, defaults = request.model_fields_set, self._defaults
        top_k = request.top_k if "top_k" in said else defaults.top_k
        return SamplingParams(
            max_tokens=room if request.most_tokens is None else request.most_tokens,
            temperature=request.temperature if "temperature" in said else defaults.temperature,
            top_k=min(max(top_k, 0), self._lm.config.vocab_size),
            top_p=request.top_p if "top_p" in said else defaults.top_p,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=tuple(biases.items()),
            # Any integer is a seed; without one every request is different.
            seed=secrets.randbits(32) if request.seed is None else request.seed % 2**32,
            stop_token_ids=tuple(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            min_tokens=request.min_tokens,
            logprobs=request.top_alternatives,
        )

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        outside = [token for token in ids if token >= self._lm.config.vocab_size]
        if outside:
            raise ApiError(400, f"{param} {outside[:5]} lie outside the vocabulary", param=param)
