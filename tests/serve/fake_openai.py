"""A server without a model: it speaks enough of OpenAI's protocol for a load generator, and fails when asked to."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FIRST_TOKEN_S = 0.02


class FakeServer:
    """Answers with as many words as asked for, and does what special prompts say."""

    def __init__(self, url: str):
        self.url = url
        self.asked: list[dict[str, Any]] = []

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", lambda request: JSONResponse({"data": [{"id": "fake"}]})),
                Route("/v1/completions", self.answer, methods=["POST"]),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
                # A server of another kind: no usage.idlm, and it says something else.
                Route("/other/v1/models", lambda request: JSONResponse({"data": [{"id": "a"}, {"id": "b"}]})),
                Route("/other/v1/completions", self.answer, methods=["POST"]),
            ]
        )

    async def answer(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.asked.append(body | {"client": request.client, "authorization": request.headers.get("authorization")})
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if prompt == "refuse":
            return JSONResponse({"error": {"message": "busy"}}, status_code=503)
        events = self.events(body, prompt, is_other=request.url.path.startswith("/other"))
        return StreamingResponse(events, media_type="text/event-stream")

    async def events(self, body: dict[str, Any], prompt: str, *, is_other: bool) -> AsyncIterator[str]:
        def event(**content: Any) -> str:
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        def choice(text: str, reason: str | None = None) -> str:
            said = {"text": text} if "prompt" in body else {"delta": {"content": text}}
            return event(choices=[{"index": 0, **said, "finish_reason": reason}], usage=None)

        yield choice("")  # a chat's opening, or a token without text
        await asyncio.sleep(60 if prompt == "hang" else FIRST_TOKEN_S)
        word = "other\u2028" if is_other and prompt == "differ" else "word\u2028"
        for _ in range(body["max_tokens"] - 1):
            yield choice(word)
        if prompt == "break":
            yield event(error={"message": "the engine failed"})
        if prompt in ("cut", "break"):
            return
        yield choice(word, "length")
        num = body["max_tokens"]
        usage = {"prompt_tokens": 5, "completion_tokens": num, "prompt_tokens_details": {"cached_tokens": 1}}
        if not is_other:
            usage["idlm"] = {"num_forwards": num // 2, "verified_by_depth": [4, 2, 0], "accepted_by_depth": [2, 1, 0]}
        if prompt != "silent":
            yield event(choices=[], usage=usage)
        yield "data: [DONE]\n\n"
