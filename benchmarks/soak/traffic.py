"""What is sent, and which answers are right. Knows HTTP and nothing of the engine behind it."""

import asyncio
import json
import random
import string
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import httpx2

Kind = Callable[[], Awaitable[None]]

MAX_TOKENS = 48
LONGEST_WAIT_S = 300.0  # for any one answer; a server that loses a request would never give one
REASONS = {"stop", "length", "abort"}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "is_on": {"type": "boolean"}},
    "required": ["kind", "is_on"],
    "additionalProperties": False,
}
# Asked again and again, whatever else runs. Two more are sampled: a seed promises as much as zero temperature does.
PROBES: tuple[dict[str, Any], ...] = (
    {"prompt": "def main():", "max_tokens": 24, "temperature": 0},
    {"prompt": "class Parser:\n    def __init__(self, ", "max_tokens": 40, "temperature": 0},
    {"prompt": "import os\n" * 12, "max_tokens": 16, "temperature": 0},
    {"prompt": "for name in ", "max_tokens": 32, "seed": 11},
    {"prompt": "return ", "max_tokens": 24, "seed": 5, "top_p": 0.9, "n": 2},
)
# Each is refused by a check of its own, at another depth.
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b'{"prompt": "x"', 400),
    (b'{"prompt": "\xff"}', 400),
    (b"[" * 2000 + b"]" * 2000, 400),
    (b'{"prompt": "x", "temperature": "hot"}', 400),
    (b'{"prompt": "x", "n": 0}', 400),
    (b'{"prompt": "x", "regex": "("}', 400),
    (b'{"prompt": ["x", 5]}', 400),
    (b'{"prompt": "x", "model": "another"}', 404),
)


class Limits(NamedTuple):
    """Of the server that is asked.

    Attributes:
        max_len: longest prompt and completion.
        max_queued: requests that may wait.
        max_running: requests that run at once.
        max_body_bytes: largest request.
    """

    max_len: int
    max_queued: int
    max_running: int
    max_body_bytes: int


class Traffic:
    """Many clients of one server. What is wrong is collected in `violations`, and the traffic goes on.

    Attributes:
        http: what asks; may be replaced between requests.
        violations: what was wrong, the first hundred.
        counts: answers, by kind of request and status.
        num_tokens: that were read.
    """

    def __init__(self, http: httpx2.AsyncClient, limits: Limits, seed: int):
        """Args: a client with the server's address and key, and what the random choices follow from."""
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.num_tokens = 0
        self.http, self._limits, self._rng = http, limits, random.Random(seed)
        self._expected: dict[int, list[str]] = {}  # by probe
        self._kinds: dict[Kind, int] = {
            self.complete: 30,
            self.chat: 12,
            self.follow_a_schema: 8,
            self.probe: 14,
            self.leave: 10,
            self.abort: 6,
            self.be_refused: 10,
            self.be_too_large: 3,
            self.burst: 1,
            self.look_around: 6,
        }

    async def run(self, seconds: float, num_clients: int, pause_s: float) -> None:
        """Keeps `num_clients` busy; each thinks for an exponential time, `pause_s` in the mean, between requests."""
        until = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(min(self._rng.expovariate(1 / pause_s), until - time.monotonic()))
                await self.one()

        await asyncio.gather(*(client() for _ in range(num_clients)))

    async def one(self) -> None:
        """A request of a random kind."""
        (kind,) = self._rng.choices(list(self._kinds), list(self._kinds.values()))
        name = getattr(kind, "__name__", "?")
        try:
            await asyncio.wait_for(kind(), LONGEST_WAIT_S)
        except TimeoutError:
            self._wrong(name, f"no answer within {LONGEST_WAIT_S:g} s")
        except (httpx2.TransportError, ValueError, LookupError, TypeError) as error:
            self._wrong(name, f"{type(error).__name__}: {error}")

    async def complete(self) -> None:
        """A completion with random parameters, streamed or whole."""
        body = self._sampling() | {"prompt": self._prompt()}
        if self._rng.random() < 0.5:  # long ones together run out of pages
            body |= {"max_tokens": self._room(), "ignore_eos": True}
        await self._ask("complete", "/v1/completions", body)

    async def chat(self) -> None:
        """A conversation of some turns."""
        turns = [{"role": "user", "content": self._text(60)}]
        if self._rng.random() < 0.5:
            turns = [{"role": "system", "content": self._text(20)}, *turns]
            turns += [{"role": "assistant", "content": self._text(30)}, {"role": "user", "content": self._text(10)}]
        await self._ask("chat", "/v1/chat/completions", self._sampling() | {"messages": turns})

    async def follow_a_schema(self) -> None:
        """JSON of a schema; what comes to its own end must be whole."""
        body = {"prompt": self._text(30), "json_schema": json.dumps(SCHEMA), "max_tokens": 64, "seed": self._seed()}
        for text, reason in await self._ask("schema", "/v1/completions", body | self._maybe_stream()):
            if reason == "stop":
                said = json.loads(text)
                if (
                    set(said) != {"kind", "is_on"}
                    or said["kind"] not in ("a", "b")
                    or not isinstance(said["is_on"], bool)
                ):
                    self._wrong("schema", f"{text!r} does not follow it")

    async def learn(self) -> None:
        """Asks all probes while nothing else runs. What they answer alone they must answer in any company."""
        for index in range(len(PROBES)):
            await self.probe(index)

    async def probe(self, index: int | None = None) -> None:
        """One of the requests whose answers never change."""
        index = self._rng.randrange(len(PROBES)) if index is None else index
        choices = await self._ask("probe", "/v1/completions", PROBES[index] | self._maybe_stream())
        if choices:
            texts = [text for text, _ in choices]
            if texts != self._expected.setdefault(index, texts):
                self._wrong("probe", f"{PROBES[index]} gave {self._expected[index]} and now {texts}")

    async def leave(self) -> None:
        """A client who goes away, before the answer or in the middle of a stream."""
        body = self._sampling() | {"prompt": self._prompt(), "ignore_eos": True, "max_tokens": self._room()}
        if self._rng.random() < 0.3:
            try:
                async with asyncio.timeout(self._rng.random()):
                    answer = await self.http.post("/v1/completions", json=body | {"stream": False})
                self._status("leave", answer.status_code, {200, 429})
            except TimeoutError:
                self.counts["leave: left"] += 1
            return
        num_lines = self._rng.randrange(8)
        async with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            self._status("leave", answer.status_code, {200, 429})
            async for _ in answer.aiter_lines():
                num_lines -= 1
                if num_lines < 0:
                    self.counts["leave: left"] += 1
                    return

    async def abort(self) -> None:
        """A stream that is ended from outside, by its name."""
        rid = f"soak-{self._rng.getrandbits(64):x}"
        body = {"prompt": self._prompt(), "max_tokens": self._room(), "ignore_eos": True, "stream": True, "rid": rid}

        async def end() -> None:
            await asyncio.sleep(self._rng.random())
            answer = await self.http.post("/abort_request", json={"rid": rid})
            self._status("abort_request", answer.status_code, {200})

        await asyncio.gather(self._ask("abort", "/v1/completions", body), end())

    async def be_refused(self) -> None:
        """A body that is none."""
        content, status = self._rng.choice(MALFORMED)
        if self._rng.random() < 0.2:
            content, status = json.dumps({"prompt": [1] * self._limits.max_len, "max_tokens": 5}).encode(), 400
        path = self._rng.choice(("/v1/completions", "/v1/chat/completions"))
        status = 400 if path.endswith("chat/completions") else status  # without messages, before the model is looked at
        answer = await self.http.post(path, content=content, headers={"content-type": "application/json"})
        self._status("refused", answer.status_code, {status})
        if set(answer.json()["error"]) != {"message", "type", "param", "code"}:
            self._wrong("refused", f"an error of another shape: {answer.text[:200]}")

    async def be_too_large(self) -> None:
        """A body beyond what is read. The server may hang up before it has been sent."""
        try:
            answer = await self.http.post("/v1/completions", content=bytes(self._limits.max_body_bytes + 1))
        except httpx2.TransportError:
            self.counts["large: hung up"] += 1
            return
        self._status("large", answer.status_code, {413})

    async def burst(self) -> None:
        """More at once than may run and wait."""
        body = {"prompt": "x = ", "max_tokens": 8}
        size = int(1.5 * (self._limits.max_queued + self._limits.max_running))
        await asyncio.gather(*(self._ask("burst", "/v1/completions", body) for _ in range(size)))

    async def look_around(self) -> None:
        """The small paths."""
        path = self._rng.choice(("/health", "/metrics", "/get_server_info", "/v1/models", "/flush_cache"))
        self._status(path, (await self.http.get(path)).status_code, {200})
        answer = await self.http.post("/tokenize", json={"prompt": self._text(200)})
        self._status("/tokenize", answer.status_code, {200})

    async def stay(self, n: int, on_line: Callable[[], None]) -> None:
        """A long stream that must come to its end; `on_line` hears of every line."""
        body = {"prompt": "x = ", "max_tokens": self._room(), "ignore_eos": True, "n": n, "stream": True}
        said = await self._ask("stay", "/v1/completions", body, on_line)
        if [reason for _, reason in said] != ["length"] * n:
            self._wrong("stay", f"ended with {[reason for _, reason in said]}")

    async def _ask(
        self, kind: str, path: str, body: dict[str, Any], on_line: Callable[[], None] = lambda: None
    ) -> list[tuple[str, str]]:
        """Text and end of each choice; nothing if the queue was full."""
        is_stream, lines = body.get("stream", False), []
        async with self.http.stream("POST", path, json=body) as answer:
            async for line in answer.aiter_lines():
                on_line()
                lines += [line] if line else []
        if not self._status(kind, answer.status_code, {200, 429}) or answer.status_code == 429:
            return []
        if not is_stream:
            whole = json.loads("".join(lines))
            self.num_tokens += whole["usage"]["completion_tokens"]
            said = [(each.get("text", ""), each["finish_reason"]) for each in whole["choices"]]
        else:
            said = self._streamed(kind, lines, body.get("n", 1))
        for _, reason in said:
            if reason not in REASONS:
                self._wrong(kind, f"ended with {reason!r}")
        if len(said) != body.get("n", 1):
            self._wrong(kind, f"{len(said)} choices, {body.get('n', 1)} asked for")
        return said

    def _streamed(self, kind: str, lines: list[str], n: int) -> list[tuple[str, str]]:
        if lines[-1] != "data: [DONE]":
            self._wrong(kind, f"a stream broke off after {lines[-1][:200]}")
            return [("", "abort")] * n
        texts, reasons = [""] * n, [""] * n
        for line in lines[:-1]:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self._wrong(kind, f"an error in the stream: {event['error']}")
                return [("", "abort")] * n
            self.num_tokens += event.get("idlm", {}).get("num_tokens", 0)
            for choice in event["choices"]:
                texts[choice["index"]] += choice.get("text", "")
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
        return list(zip(texts, reasons, strict=True))

    def _status(self, kind: str, status: int, allowed: set[int]) -> bool:
        self.counts[f"{kind}: {status}"] += 1
        if status not in allowed:
            self._wrong(kind, f"status {status}, allowed is {sorted(allowed)}")
        return status in allowed

    def _wrong(self, kind: str, what: str) -> None:
        self.counts[f"{kind}: wrong"] += 1
        if len(self.violations) < 100:
            self.violations.append(f"{kind}: {what}")

    def _sampling(self) -> dict[str, Any]:
        rng = self._rng
        body: dict[str, Any] = {"max_tokens": rng.randint(1, MAX_TOKENS), "temperature": rng.choice([0, 0.7, 1])}
        for name, share, value in (
            ("n", 0.15, rng.randint(1, 4)),
            ("seed", 0.5, self._seed()),
            ("top_p", 0.3, rng.uniform(0.1, 1)),
            ("top_k", 0.2, rng.randint(-1, 50)),
            ("min_p", 0.1, rng.random() / 4),
            ("presence_penalty", 0.1, rng.uniform(-2, 2)),
            ("logit_bias", 0.1, {str(rng.randrange(100, 4000)): rng.uniform(-5, 5)}),
            ("stop", 0.3, rng.choice([["\n"], "(", ["self", "\n\n"], ["é"]])),
            ("ignore_eos", 0.2, True),
        ):
            if rng.random() < share:
                body[name] = value
        return body | self._maybe_stream()

    def _maybe_stream(self) -> dict[str, Any]:
        if self._rng.random() < 0.5:
            return {}
        return {"stream": True, "stream_options": {"include_usage": self._rng.random() < 0.5}}

    def _prompt(self) -> str | list[int]:
        if self._rng.random() < 0.3:
            return [self._rng.randrange(100, 4000) for _ in range(self._rng.randint(1, self._limits.max_len // 2))]
        # Some begin alike, for the prefix cache.
        text = ("import os, sys, re\n" * 8 if self._rng.random() < 0.3 else "") + self._text(80)
        # A token is a byte at least, so this many fit with the longest completion.
        return text.encode()[: self._limits.max_len // 2].decode(errors="ignore")

    def _text(self, longest: int) -> str:
        letters = string.ascii_letters + string.digits + " \n():._'=é漢🙂<|im_end|>"
        return "".join(self._rng.choices(letters, k=self._rng.randint(1, longest)))

    def _room(self) -> int:
        return self._limits.max_len // 2

    def _seed(self) -> int:
        return self._rng.getrandbits(40)
