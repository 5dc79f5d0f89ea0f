"""One soak: a quiet start, traffic, a quiet end, and a SIGTERM under open streams."""

import asyncio
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx2

from benchmarks.soak.traffic import Limits, Traffic
from benchmarks.soak.watch import Process, Sample, Server, bad_lines, growth, look_at, sample, terminate

SAMPLE_EVERY_S = 1.0
IDLE_WITHIN_S = 60.0
# What has been closed here is closed over there soon after.
CLOSED_WITHIN_S = 10.0
ENDS_WITHIN_S = 120.0


class Outcome(NamedTuple):
    """What a soak came to.

    Attributes:
        violations: what was wrong; empty if all was well.
        samples: the server, about once a second, while there was traffic.
        counts: answers, by kind of request and status.
        num_tokens: that clients have read.
        growth: of resident memory, last third over middle third, less one; None if it was not looked at.
        before: the process at rest, warm, without connections.
        after: the same when all traffic had gone.
        num_pages: that requests can have.
        num_free_pages: of them, at rest and with an empty prefix cache, at the end.
        exit_code: after SIGTERM; None if it never ended.
        info: of /get_server_info, at the end.
    """

    violations: list[str]
    samples: list[Sample]
    counts: dict[str, int]
    num_tokens: int
    growth: float | None
    before: Process
    after: Process
    num_pages: int
    num_free_pages: int
    exit_code: int | None
    info: dict[str, Any]


async def soak(
    server: Server,
    *,
    seconds: float,
    num_clients: int,
    pause_s: float,
    max_body_bytes: int,
    seed: int,
    max_growth: float | None,
    on_sample: Callable[[Sample, Traffic], None] = lambda _sample, _traffic: None,
) -> Outcome:
    """Puts traffic on a fresh server, and ends it.

    Args:
        server: that nobody else asks.
        seconds: of traffic.
        num_clients: who ask at once.
        pause_s: mean time that one of them thinks between requests.
        max_body_bytes: what the server was started with.
        seed: of all random choices. Which of them meet is up to the clock.
        max_growth: of memory; None to let it grow, in a run too short to tell.
        on_sample: hears of every sample.
    """
    async with _client(server) as http:
        info = await _info(http)
        limits = Limits(
            max_len=info["context_length"],
            max_queued=info["max_queued_requests"],
            max_running=info["max_running_requests"],
            max_body_bytes=max_body_bytes,
        )
        traffic = Traffic(http, limits, seed)
        await traffic.learn()
        if traffic.violations:
            raise ValueError(f"already the first requests went wrong: {'; '.join(traffic.violations)}")
    before = await _closed(server)
    async with _client(server) as http:
        traffic.http = http
        samples = await _observe(server, traffic, traffic.run(seconds, num_clients, pause_s), on_sample)
        info = await _rest(http, traffic.violations)
        await traffic.learn()
        info = await _rest(http, traffic.violations)
    after = await _closed(server, at_most=before.num_files)
    found = traffic.violations
    if after.num_files > before.num_files:
        found.append(f"{after.num_files} files and sockets are open at the end, {before.num_files} at the beginning")
    grown = None
    if max_growth is not None:
        grown = growth(samples)
        if grown > max_growth:
            found.append(f"memory grew by {grown:.2%} from the middle third to the last, {max_growth:.2%} is allowed")
    num_tokens = traffic.num_tokens  # as `info`, before the last streams
    exit_code = await _end(server, traffic)
    found += [f"the log says: {line}" for line in bad_lines(server.log.read_text(errors="replace"))[:20]]
    stats = info["stats"]
    return Outcome(
        violations=found,
        samples=samples,
        counts=dict(sorted(traffic.counts.items())),
        num_tokens=num_tokens,
        growth=grown,
        before=before,
        after=after,
        num_pages=info["num_pages"] - 1,
        num_free_pages=stats["num_free_pages"] - stats["num_cached_pages"],
        exit_code=exit_code,
        info=info,
    )


def _client(server: Server) -> httpx2.AsyncClient:
    # `Traffic` bounds what one answer may take, and burst takes as many connections as it likes.
    return httpx2.AsyncClient(base_url=server.url, timeout=None, limits=httpx2.Limits(max_connections=None))


async def _info(http: httpx2.AsyncClient) -> dict[str, Any]:
    return (await http.get("/get_server_info", timeout=60)).raise_for_status().json()


async def _observe(
    server: Server, traffic: Traffic, work: Any, on_sample: Callable[[Sample, Traffic], None]
) -> list[Sample]:
    """Looks at the server until the traffic is over.

    Raises:
        ValueError: the server ended under it.
    """
    start, samples = time.monotonic(), []
    running = asyncio.ensure_future(work)
    async with _client(server) as http:
        while not running.done():
            try:
                stats = (await _info(http))["stats"]
                samples.append(sample(server, stats, time.monotonic() - start))
                on_sample(samples[-1], traffic)
            except (httpx2.HTTPError, OSError) as error:
                if server.process.poll() is not None:
                    running.cancel()
                    raise ValueError(f"the server ended with {server.process.returncode} under traffic") from None
                traffic.violations.append(f"/get_server_info: {type(error).__name__}: {error}")
            await asyncio.wait([running], timeout=SAMPLE_EVERY_S)
    await running
    return samples


async def _rest(http: httpx2.AsyncClient, violations: list[str]) -> dict[str, Any]:
    """Waits until nothing runs, empties the prefix cache, and wants every page back."""

    async def until(what: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + IDLE_WITHIN_S
        while not is_so((info := await _info(http))["stats"]):
            if time.monotonic() > deadline:
                stats = {name: info["stats"][name] for name in Sample._fields if name in info["stats"]}
                violations.append(f"{what}, {IDLE_WITHIN_S:g} s after the last request: {stats}")
                break
            await asyncio.sleep(0.1)
        return info

    await until("requests are left", lambda stats: stats["num_running"] + stats["num_waiting"] == 0)
    await http.post("/flush_cache")
    info = await until("the prefix cache is not empty", lambda stats: stats["num_cached_pages"] == 0)
    lost = info["num_pages"] - 1 - info["stats"]["num_free_pages"]
    if lost:
        violations.append(f"{lost} of {info['num_pages'] - 1} pages are lost")
    return info


async def _closed(server: Server, at_most: int = 0) -> Process:
    """The process when it has noticed that clients are gone: with `at_most` open files, or after a while."""
    deadline = time.monotonic() + CLOSED_WITHIN_S
    while (seen := look_at(server)).num_files > at_most and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        if not at_most and look_at(server).num_files == seen.num_files:
            break
    return seen


async def _end(server: Server, traffic: Traffic) -> int | None:
    """SIGTERM in the middle of streams: they come to their end, nobody else is let in, and the exit code is 0."""
    found, num_lines, num_streams = traffic.violations, 0, 3

    def count() -> None:
        nonlocal num_lines
        num_lines += 1

    async with _client(server) as http:
        traffic.http = http
        streams = [asyncio.ensure_future(traffic.stay(2, count)) for _ in range(num_streams)]
        while num_lines < num_streams and not all(each.done() for each in streams):
            await asyncio.sleep(0.01)
        terminate(server)
        is_refused = False
        while not is_refused and not all(each.done() for each in streams):
            await asyncio.sleep(0.02)
            is_refused = await _is_refused(server)
        before = num_lines
        try:
            await asyncio.wait_for(asyncio.gather(*streams), ENDS_WITHIN_S)
        except (httpx2.HTTPError, TimeoutError, ValueError, LookupError) as error:
            found.append(f"a stream that was open at SIGTERM broke off: {type(error).__name__}: {error}")
        if not is_refused or num_lines == before:
            found.append("connections were still taken after SIGTERM while streams ran")
    try:
        code = await asyncio.to_thread(server.process.wait, ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        found.append(
            f"after SIGTERM the server ended with {code}, not 0" if code is not None else "SIGTERM did not end it"
        )
    return code


async def _is_refused(server: Server) -> bool:
    try:
        async with _client(server) as http:
            await http.get("/health", timeout=5)
    except httpx2.TransportError:
        return True
    return False
