"""Prometheus metrics: vLLM's names under our own prefix, so that its dashboards need one word changed."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engine import Engine

PREFIX = "idlm:"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Clock:
    """The times of one completion."""

    def __init__(self, owner: "Latencies"):
        self._owner, self._start, self._last, self._num_tokens = owner, time.perf_counter(), 0.0, 0

    def tick(self, num_tokens: int) -> None:
        """Tokens have come."""
        if not num_tokens:
            return
        now = time.perf_counter()
        if self._num_tokens:
            self._owner.between.observe(now - self._last)
        else:
            self._owner.first.observe(now - self._start)
        self._last, self._num_tokens = now, self._num_tokens + num_tokens

    def stop(self) -> None:
        """The last have come."""
        self._owner.whole.observe(time.perf_counter() - self._start)


class Latencies:
    """Histograms over completions."""

    def __init__(self, registry: CollectorRegistry, model: str):
        def seconds(name: str, text: str) -> Histogram:
            histogram = Histogram(PREFIX + name, text, ["model_name"], registry=registry, buckets=_SECONDS)
            return histogram.labels(model)

        self.first = seconds("time_to_first_token_seconds", "From admission to the first token.")
        # One forward may commit several tokens, which then arrive together.
        self.between = seconds("inter_token_latency_seconds", "Between arrivals of one completion's tokens.")
        self.whole = seconds("e2e_request_latency_seconds", "From admission to the last token.")

    def start(self) -> Clock:
        return Clock(self)


class EngineCollector(Collector):
    """What the engine counts, read when it is asked for."""

    def __init__(self, engine: Engine, num_pages: int, num_masks: int, model: str):
        """Args: `num_pages` can be given to requests; `num_masks` drafts are verified at a time."""
        self._engine, self._num_pages, self._num_masks, self._model = engine, num_pages, num_masks, model

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        tally = stats.tally
        # Depth 0 is verified whenever any draft is.
        num_drafts = int(tally.verified[0]) if self._num_masks else 0
        yield self._gauge("num_requests_running", "Requests with a slot.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests without one.", stats.num_waiting)
        usage = 1 - stats.num_free_pages / self._num_pages
        yield self._gauge("kv_cache_usage_perc", "Pages that running requests hold; 1 is all.", usage)
        yield self._counter("num_preemptions", "Slots taken away for lack of pages.", stats.num_preemptions)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.num_prompt_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats.num_cached_tokens)
        yield self._counter("prompt_tokens", "Prompt tokens of admitted requests.", stats.num_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens committed.", stats.num_committed)
        yield self._counter("spec_decode_num_drafts", "Forwards that verified drafts.", num_drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Drafts offered.", num_drafts * self._num_masks)
        yield self._counter("spec_decode_num_accepted_tokens", "Drafts accepted.", int(tally.accepted.sum()))
        # vLLM counts a draft behind a refused one as offered; only these were looked at.
        yield self._counter("spec_decode_num_verified_tokens", "Drafts checked.", int(tally.verified.sum()))
        yield self._counter("request_forwards", "Forwards, once for each request in them.", tally.forwards)
        yield self._counter("cold_start_steps", "Forwards without a draft to verify.", tally.cold_starts)
        steps = self._family("decode_steps", "Decode forwards, by the method that was chosen.", "method")
        for method, count in stats.num_decode_forwards_by_method.items():
            steps.add_metric([self._model, method], count)
        yield steps
        accepted = self._family("spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by depth.", "position")
        for depth, count in enumerate(tally.accepted):
            accepted.add_metric([self._model, str(depth)], int(count))
        yield accepted
        finished = self._family("request_success", "Requests that ended, by reason.", "finished_reason")
        for reason, count in stats.finished.items():
            finished.add_metric([self._model, reason], count)
        yield finished

    def _family(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(PREFIX + name, text, labels=["model_name", *labels])

    def _counter(self, name: str, text: str, value: int) -> Metric:
        family = self._family(name, text)
        family.add_metric([self._model], value)
        return family

    def _gauge(self, name: str, text: str, value: int | float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
