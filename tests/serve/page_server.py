"""The page before a server without a model, whose replies are scripted by what it is asked."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.http.gate import Gate
from serve.http.page import routes

INJECTED = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
KEY = "a key"
STRIDE = 4


class PageServer:
    """What the page talks to.

    Attributes:
        asked: bodies of completions, in order.
        go: lets a reply to "slow" take its next step.
        num_hung_up: replies whose reader left.
        num_status: times that the status was asked for.
    """

    def __init__(self, url: str):
        self.url = url
        self.asked: list[dict[str, Any]] = []
        self.go = threading.Semaphore(0)
        self.num_hung_up = self.num_status = 0

    def app(self, api_keys: tuple[str, ...]) -> Starlette:
        api = [
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/get_server_info", self.info),
        ]
        gate = Middleware(Gate, api_keys=api_keys, max_body_bytes=10_000)
        return Starlette(routes=[*routes(), *api], middleware=[gate])

    async def info(self, request: Request) -> Response:
        self.num_status += 1
        forwards = 10 * self.num_status
        tally = {"forwards": forwards, "cold_starts": 1, "accept_prob": [0.0] * 3}
        tally |= {"verified": [forwards, forwards, forwards], "accepted": [8 * self.num_status, 5 * self.num_status, 0]}
        stats = {"num_running": 1, "num_waiting": 2, "num_free_pages": 48, "num_cached_pages": 7, "tally": tally}
        stats |= {"num_committed": 25 * self.num_status, "num_prompt_tokens": 200, "num_cached_tokens": 50}
        sizes = {"max_running_requests": 4, "max_queued_requests": 8, "context_length": 512, "num_pages": 65}
        method = {"name": "ISD", "stride": STRIDE}
        return JSONResponse({"served_model_name": "scripted", "method": method, "stats": stats, **sizes})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if asked == "full":
            error = {"error": {"message": "8 requests wait already"}}
            return JSONResponse(error, status_code=429, headers={"retry-after": "3"})
        return StreamingResponse(self.events(request, body, asked), media_type="text/event-stream")

    async def events(self, request: Request, body: dict[str, Any], asked: str) -> AsyncIterator[str]:
        is_chat = "messages" in body

        def chunk(text: str, num_tokens: int | None = None, field: str = "content", end: str | None = None) -> str:
            said = {"delta": {field: text}} if is_chat else {"text": text}
            counted = {} if num_tokens is None else {"idlm": {"num_tokens": num_tokens}}
            return _event({"choices": [{"index": 0, **said, "finish_reason": end}], "usage": None, **counted})

        if is_chat:
            yield chunk("")
        match asked:
            case "slow":
                for word in ("one ", "two ", "three "):
                    try:
                        while not self.go.acquire(blocking=False):
                            await asyncio.sleep(0.01)
                    except asyncio.CancelledError:
                        self.num_hung_up += 1
                        raise
                    yield chunk(word, 1)
            case "think":
                yield chunk("let me see", 2, field="reasoning_content")
                yield chunk("an end of thought", 3, field="reasoning_content")
                yield chunk("an answer", field="content")
            case "inject":
                yield chunk(INJECTED, 4)
            case "uncounted":
                yield chunk("grey")
            case "cut":
                yield chunk("half", 1)
                return
            case "vanish":
                yield chunk("half", 1)
                await asyncio.sleep(0.1)
                raise ConnectionError("as scripted")
            case "break":
                yield chunk("half", 1)
                yield _event({"error": {"message": "out of memory"}})
            case _:
                for num_tokens in (1, 2, 3, 4, 9):
                    # Events need not arrive as they were sent.
                    event = chunk(f"<{num_tokens} \u00e9\U0001f600>", num_tokens)
                    yield event[:20]
                    await asyncio.sleep(0.005)
                    yield event[20:]
        yield chunk("", end="length")
        idlm = {"num_forwards": 5, "verified_by_depth": [4, 4, 0], "accepted_by_depth": [3, 2, 0]}
        usage = {"prompt_tokens": 3, "completion_tokens": 19, "idlm": idlm | {"tokens_per_forward": 3.8}}
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


@contextlib.contextmanager
def serving_page(*api_keys: str) -> Iterator[PageServer]:
    """The page on loopback; with keys, its API asks for one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        page_server = PageServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(page_server.app(api_keys), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield page_server
        finally:
            server.should_exit = True
            thread.join()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
