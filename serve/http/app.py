"""Paths, and which errors they answer with."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import jax
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from idlm_jax.decoding.method import method_name
from idlm_jax.decoding.prompts import encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import LanguageModel
from serve.config import EngineConfig
from serve.engine import Engine
from serve.handle import EngineError, Piece
from serve.http.errors import ApiError, ErrorBody, from_validation
from serve.http.gate import Gate
from serve.http.jobs import Job, Jobs
from serve.http.metrics import EngineCollector, Latencies
from serve.http.page import routes
from serve.http.prompts import encode_chat
from serve.http.replies import events, whole
from serve.http.schemas import AbortRequest, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serve.official import Defaults
from serve.scheduler import QueueFull

logger = logging.getLogger(__name__)

# For the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused, or not now."},
    "5XX": {"model": ErrorBody, "description": "The engine failed, or is down."},
}
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or its events.", "content": {"text/event-stream": {}}}
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """What the outside sees.

    Attributes:
        model: the name that requests give.
        model_path: where it was loaded from.
        api_keys: any of them opens all paths; none leaves them open.
        max_body_bytes: largest request.
        health_timeout_s: how long one token may take before `/health_generate` calls the engine ill.
        watchdog_s: how long requests may wait for a step before `/health` does; a device that hangs says nothing.
        close_timeout_s: how long a server that ends waits for the device.
        defaults: for requests that do not say how to sample.
    """

    model: str
    model_path: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    health_timeout_s: float = 20.0
    watchdog_s: float = 300.0
    close_timeout_s: float = 10.0
    defaults: Defaults = dataclasses.field(default_factory=Defaults)


class EventStream(StreamingResponse):
    """Server-sent events of a job, which ends with the connection however that ends."""

    def __init__(self, job: Job, jobs: Jobs):
        super().__init__(events(job, jobs), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._job, self._jobs = job, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._jobs.close(self._job)


def make_app(engine: Engine, lm: LanguageModel, engine_config: EngineConfig, config: HttpConfig) -> FastAPI:
    """The application; it closes the engine when it ends.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError(f"{config.model_path} has no tokenizer, and the protocol is made of text")
    tokenizer = lm.tokenizer
    limits = engine_config.limits(lm.config)
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, limits.num_pages - 1, limits.stride - 1, config.model))
    jobs = Jobs(engine, lm, config.defaults, Latencies(registry, config.model))
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # Connections are gone by now, so nobody waits for what might still run.
        if not await run_in_threadpool(engine.close, drain=False, timeout_s=config.close_timeout_s):
            logger.error("the device did not come back within %g s; ending without it", config.close_timeout_s)

    app = FastAPI(title="I-DLM", lifespan=lifespan, responses=ERRORS)
    app.add_middleware(Gate, api_keys=config.api_keys, max_body_bytes=config.max_body_bytes)
    _add_error_handlers(app)
    app.router.routes += routes()

    def check_model(name: str | None) -> None:
        if name not in (None, config.model):
            raise ApiError(
                404, f"no model {name!r}: this server has {config.model!r}", param="model", code="model_not_found"
            )

    async def answer(body: CompletionRequest | ChatRequest, request: Request) -> Response:
        check_model(body.model)
        job = await jobs.start(body, config.model)
        if body.stream:
            return EventStream(job, jobs)
        try:
            return await _unless_gone(job, jobs, request)
        finally:
            jobs.close(job)

    @app.post("/v1/completions", response_model=None, responses=STREAMS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(body, request)

    @app.post("/v1/chat/completions", response_model=None, responses=STREAMS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answer(body, request)

    card = {"id": config.model, "object": "model", "created": started, "owned_by": "idlm-jax"}
    card |= {"root": config.model_path, "max_model_len": engine.longest_request}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name)
        return card

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        if engine.failure is not None:
            raise ApiError(503, engine.failure, code="unavailable")
        if engine.stalled_s > config.watchdog_s:
            raise ApiError(503, f"requests wait, and no step ended for {engine.stalled_s:.0f} s", code="unavailable")
        return Response()

    @app.get("/health_generate", response_class=Response)
    async def health_generate() -> Response:
        await _generate_one(engine, lm, config.health_timeout_s)
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/get_model_info")
    async def get_model_info() -> dict[str, Any]:
        return {"model_path": config.model_path, "tokenizer_path": config.model_path, "is_generation": True}

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def get_server_info() -> dict[str, Any]:
        stats = engine.stats()
        tally = stats.tally
        # Where SGLang's benchmark looks for tokens per forward.
        state = {"avg_spec_accept_length": stats.num_committed / tally.forwards if tally.forwards else None}
        counts = dataclasses.asdict(stats)
        counts["tally"] = {key: np.asarray(value).tolist() for key, value in counts["tally"].items()}
        method = {"name": type(engine_config.method).__name__, "stride": engine_config.stride}
        method |= {"menu": [method_name(each) for each in engine_config.method.menu]}
        info = {"model_path": config.model_path, "served_model_name": config.model, "method": method}
        info |= {
            "device": jax.devices()[0].device_kind,
            "dtype": lm.config.compute_dtype,
            "quantization": lm.config.quantize,
            "jax": jax.__version__,
        }
        sizes = {"max_running_requests": limits.num_slots, "max_queued_requests": limits.max_queued}
        sizes |= {"context_length": engine.longest_request, "num_pages": limits.num_pages}
        return info | sizes | {"internal_states": [state], "stats": counts}

    @app.get("/flush_cache", include_in_schema=False)
    @app.post("/flush_cache")
    async def flush_cache() -> dict[str, Any]:
        engine.flush_cache()
        return {"success": True}

    @app.post("/abort_request")
    async def abort_request(body: AbortRequest) -> dict[str, Any]:
        chosen = [job for job in jobs.running.values() if body.abort_all or job.id == body.rid]
        for job in chosen:
            job.abort()
        return {"aborted": len(chosen)}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        check_model(body.model)
        if (body.prompt is None) == (not body.messages):
            raise ApiError(400, "give either prompt or messages")
        text = body.prompt

        def work() -> list[int]:
            if text is None:
                return encode_chat(lm, body.messages, body.tools, body.chat_template_kwargs).token_ids
            return encode_prompt(lm, text, 0) if text else []

        try:
            tokens = await jobs.tokenize(work)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.longest_request}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model)
        outside = [token for token in body.tokens if not 0 <= token < lm.config.vocab_size]
        if outside:
            raise ApiError(400, f"tokens {outside[:5]} lie outside the vocabulary", param="tokens")
        return {"prompt": await jobs.tokenize(lambda: str(tokenizer.decode(body.tokens)))}

    return app


async def _unless_gone(job: Job, jobs: Jobs, request: Request) -> Response:
    """The whole answer, unless its reader leaves first."""
    answer, gone = asyncio.ensure_future(whole(job, jobs)), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answer.result()) if answer.done() else Response(status_code=499)
    except EngineError as error:
        raise ApiError(500, str(error), code="engine_error") from error
    finally:
        answer.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _generate_one(engine: Engine, lm: LanguageModel, timeout_s: float) -> None:
    """Raises ApiError unless the engine delivers a token in time."""
    loop, first = asyncio.get_running_loop(), asyncio.Event()
    pieces: list[Piece] = []

    def deliver(piece: Piece) -> None:
        pieces.append(piece)
        loop.call_soon_threadsafe(first.set)

    token = next(token for token in (*lm.config.eos_token_ids, 0, 1) if token != lm.config.mask_token_id)
    try:
        handle = engine.submit([token], SamplingParams(max_tokens=1), deliver=deliver)
        try:
            await asyncio.wait_for(first.wait(), timeout_s)
        finally:
            handle.abort()
    except (EngineError, QueueFull) as error:
        raise ApiError(503, str(error), code="unavailable") from error
    except TimeoutError as error:
        raise ApiError(503, f"no token within {timeout_s:g} s", code="unavailable") from error
    if pieces[0].error is not None:
        raise ApiError(503, pieces[0].error, code="engine_error")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response(error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed at this request; its log says why", code="internal_error").response()
