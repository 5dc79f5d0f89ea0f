"""One streamed request and its timestamps.

Over httpx2 and not the `openai` client, whose typed objects cost more than the rest: 64 streams of 50 chunks a second
took 85 us of processor time per chunk instead of 150 (75 with a hand-written parser of events), and where the servers
run on the same machine, that time is theirs.
"""

import asyncio
import dataclasses
import json
import time
from typing import Any

import httpx2

from serve.bench.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    Attributes:
        name: in tables.
        url: up to and with `/v1`.
    """

    name: str
    url: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What all requests ask for; request `i` of a benchmark is seeded with `seed + i`."""

    max_tokens: int
    temperature: float
    top_p: float
    ignore_eos: bool
    seed: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"{self.max_tokens=} must be at least 1, {self.temperature=} at least 0, {self.top_p=} in (0, 1]"
            )

    def body(self, number: int) -> dict[str, Any]:
        """Parameters of request `number`; those that ask for nothing are left out, for servers that refuse them."""
        body: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.temperature > 0:
            body["seed"] = self.seed + number
        if self.top_p < 1:
            body["top_p"] = self.top_p
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A request that ended well. Seconds count from when it was due, so a late sender does not flatter the server.

    Attributes:
        number: of the request in its run.
        due_s: since the run began.
        late_s: between due and sent.
        ttft_s: until the first text, or the end if there was none.
        latency_s: until the last token.
        num_chunks: events of the stream that held text or the end.
        num_forwards: forward passes, None from servers that do not say.
        verified_by_depth: drafts checked, by their distance from the last certain token; empty from other servers.
        accepted_by_depth: and those kept.
    """

    number: int
    due_s: float
    late_s: float
    ttft_s: float
    latency_s: float
    num_chunks: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    num_forwards: int | None
    verified_by_depth: list[int]
    accepted_by_depth: list[int]
    finish_reason: str
    text: str

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None when there is no other."""
        if self.completion_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.completion_tokens - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A request without a complete answer. Its times enter no statistics.

    Attributes:
        number: of the request in its run.
        due_s: since the run began.
        kind: `HTTP <status>`, the name of an exception, or what was wrong with the stream.
        detail: one line of what the server or the exception said.
    """

    number: int
    due_s: float
    kind: str
    detail: str


class BadReply(Exception):
    """An answer that is not one."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


class Client:
    """Asks one model of one server. Used as an async context, which owns the connections."""

    def __init__(self, endpoint: Endpoint, model: str, sampling: Sampling, *, api_key: str | None, timeout_s: float):
        self.endpoint, self.model = endpoint, model
        self._sampling, self._timeout_s = sampling, timeout_s
        self._http = httpx2.AsyncClient(
            headers=auth(api_key),
            # One deadline for the whole request, below; connections as many as the load asks for. They are not kept
            # over pauses, because servers (uvicorn: after 5 s) hang up just when they are taken up again.
            timeout=None,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def ask(self, prompt: Prompt, *, number: int, seed: int, due: float, began: float) -> Answer | Failure:
        """Sends a request now and reads its stream to the end.

        Args:
            prompt: text, or the messages of a chat.
            number: of the request in its run.
            seed: what is added to the seed of `Sampling`.
            due: when it was to be sent, by `time.perf_counter`.
            began: when the run began, by the same clock.
        """
        is_chat = not isinstance(prompt, str)
        path = "/chat/completions" if is_chat else "/completions"
        body = {"model": self.model, "messages" if is_chat else "prompt": prompt, **self._sampling.body(seed)}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with asyncio.timeout(self._timeout_s):
                late_s = time.perf_counter() - due
                async with self._http.stream("POST", self.endpoint.url + path, json=body) as response:
                    if response.status_code != 200:
                        raise BadReply(
                            f"HTTP {response.status_code}", (await response.aread()).decode(errors="replace")
                        )
                    stream = await _read(response)
            return stream.answer(number=number, due=due, began=began, late_s=late_s)
        # Whatever breaks is counted and told, and the others go on.
        except Exception as error:
            kind = error.kind if isinstance(error, BadReply) else type(error).__name__
            detail = str(error) or f"within {time.perf_counter() - due:.1f} s"
            return Failure(number=number, due_s=due - began, kind=kind, detail=" ".join(detail.split())[:300])


def auth(api_key: str | None) -> dict[str, str]:
    """Headers that carry the key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def find_model(endpoint: Endpoint, api_key: str | None) -> str:
    """The model that a server offers.

    Raises:
        ValueError: it cannot be asked, or offers none or several.
    """
    url = f"{endpoint.url}/models"
    try:
        reply = httpx2.get(url, headers=auth(api_key), timeout=30)
    except httpx2.TransportError as error:
        raise ValueError(f"cannot reach {endpoint.name} at {url}: {error or type(error).__name__}") from None
    if reply.status_code != 200:
        hint = {401: ": set IDLM_API_KEY", 404: ": does the address end in /v1?"}.get(reply.status_code, "")
        raise ValueError(f"{endpoint.name}: GET {url} answered {reply.status_code}{hint}")
    try:
        names = [card["id"] for card in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{endpoint.name}: GET {url} did not answer with a list of models") from None
    if len(names) != 1:
        raise ValueError(f"{endpoint.name} offers {names}: choose with --model")
    return names[0]


def server_info(endpoint: Endpoint, api_key: str | None) -> dict[str, Any] | None:
    """What servers of this project and of SGLang say about themselves, for the record; None from others."""
    try:
        url = endpoint.url.removesuffix("/v1") + "/get_server_info"
        reply = httpx2.get(url, headers=auth(api_key), timeout=30)
        info = reply.json() if reply.status_code == 200 else None
    except (httpx2.HTTPError, ValueError):
        return None
    return info if isinstance(info, dict) else None


class _Stream:
    """What a stream of events amounts to."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0
        self.num_chunks = 0
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None

    def take(self, event: dict[str, Any], now: float) -> None:
        """Adds an event that arrived at `now`."""
        if event.get("error"):
            error = event["error"]
            raise BadReply("error in the stream", str(error.get("message") if isinstance(error, dict) else error))
        for choice in event.get("choices", ()):
            text = _text(choice)
            reason = choice.get("finish_reason")
            if not text and reason is None:
                continue  # a chat's opening, or a token that is no whole character yet
            self.num_chunks += 1
            self.last = now
            self.first = now if self.first is None else self.first
            self.texts.append(text)
            self.finish_reason = reason or self.finish_reason
        self.usage = event.get("usage") or self.usage

    def answer(self, *, number: int, due: float, began: float, late_s: float) -> Answer:
        if self.first is None or self.finish_reason is None:
            raise BadReply("stream ended early", f"after {self.num_chunks} chunks, without a finish_reason")
        if self.usage is None:
            raise BadReply("no usage", "the server ignores stream_options.include_usage, so its tokens are unknown")
        own: dict[str, Any] = self.usage.get("idlm") or {}
        return Answer(
            number=number,
            due_s=due - began,
            late_s=late_s,
            ttft_s=self.first - due,
            latency_s=self.last - due,
            num_chunks=self.num_chunks,
            prompt_tokens=self.usage["prompt_tokens"],
            cached_tokens=(self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            completion_tokens=self.usage["completion_tokens"],
            num_forwards=own.get("num_forwards"),
            verified_by_depth=own.get("verified_by_depth", []),
            accepted_by_depth=own.get("accepted_by_depth", []),
            finish_reason=self.finish_reason,
            text="".join(self.texts),
        )


def _text(choice: dict[str, Any]) -> str:
    """New text of a choice. Thoughts are tokens too: vLLM and SGLang send them under a name of their own."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return (delta.get("reasoning_content") or delta.get("reasoning") or "") + (delta.get("content") or "")


async def _read(response: httpx2.Response) -> _Stream:
    stream = _Stream()
    # To the end, past [DONE]: a connection that is left earlier is closed and cannot serve the next request.
    async for event in httpx2.EventSource(response):
        now = time.perf_counter()
        if event.data != "[DONE]":
            stream.take(json.loads(event.data), now)
    return stream
