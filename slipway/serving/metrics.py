"""What a replica tells Prometheus.

What every request changes is kept in plain numbers by the event loop's thread alone, and made a metric when it is
scraped: the library's own, which lock and search, cost a request four times as much. The others bind their labels
beforehand.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from slipway.package import MODEL, Package

ENDPOINTS = ("infer", "feedback", "model", "health", "metrics", "other")
CODES = (200, 202, 400, 404, 405, 408, 413, 429, 431, 500, 503, 504)

# Fine where a promise of 100 ms is kept or broken.
SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09),
    *(0.1, 0.11, 0.125, 0.15, 0.175, 0.2, 0.25, 0.35, 0.5, 1.0, 2.5, 5.0, 10.0),
)
ENGINE_SECONDS = (0.0001, 0.00025, *SECONDS)
CACHE_SECONDS = (0.000005, 0.00001, 0.000025, 0.00005, *ENGINE_SECONDS)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Buckets:
    """A histogram's numbers."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value; one on a bound is below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        """Bound and count of all values up to it."""
        sums = itertools.accumulate(self.counts)
        return list(zip(map(floatToGoString, (*self.bounds, math.inf)), map(float, sums), strict=True))


class Endpoint:
    """What became of one endpoint's requests."""

    __slots__ = ("codes", "seconds")

    def __init__(self) -> None:
        self.codes = dict.fromkeys(CODES, 0)
        self.seconds = Buckets(SECONDS)


class Plain(Collector):
    """Makes metrics of plain numbers."""

    def __init__(self, endpoints: Mapping[str, Endpoint], histograms: Mapping[tuple[str, str], Buckets]) -> None:
        self._endpoints, self._histograms = endpoints, histograms

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        """Give the metrics, as the registry wants them."""
        requests = CounterMetricFamily("slipway_requests", "Answered requests.", labels=["endpoint", "code"])
        text = "From the whole request to its answer."
        seconds = HistogramMetricFamily("slipway_request_seconds", text, labels=["endpoint"])
        for name, endpoint in self._endpoints.items():
            for code, count in endpoint.codes.items():
                requests.add_metric([name, str(code)], count)
            seconds.add_metric([name], endpoint.seconds.cumulated(), endpoint.seconds.total)
        yield requests
        yield seconds
        for (name, text), buckets in self._histograms.items():
            yield HistogramMetricFamily(name, text, buckets.cumulated(), buckets.total)


class Metrics:
    """One registry of its own: a process may hold several servers, as tests do."""

    def __init__(self) -> None:
        self.warming_up = False
        """What the model does now is its warm-up: no user's, so it counts nowhere. Probes and refusals always count."""
        # They would be a series beside each other one, for what the process' start tells already.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._endpoints = {name: Endpoint() for name in ENDPOINTS}
        self._waited, self._gathered, self._engine = (Buckets(ENGINE_SECONDS) for _ in range(3))
        self._sizes = Buckets(SIZES)
        histograms = {
            ("slipway_queue_seconds", "Wait of a request for the engine."): self._waited,
            ("slipway_batch_seconds", "From a batch's first request to its run."): self._gathered,
            ("slipway_engine_seconds", "One run of the engine."): self._engine,
            ("slipway_batch_size", "Samples in one run of the engine."): self._sizes,
        }
        self._registry.register(Plain(self._endpoints, histograms))
        self._queue = Gauge("slipway_queue_length", "Requests that wait for the engine.", registry=self._registry)
        self.ready = Gauge("slipway_ready", "1: ready for traffic.", registry=self._registry)
        self.feedback = Counter(
            "slipway_feedback_total",
            "First feedback on what was shown, by the version that showed it.",
            ["shown_version", "outcome"],
            registry=self._registry,
        )
        scores = Counter(
            "slipway_scores_total",
            "Sampled scores, by the tenth of the sealed model's scores that they fall into.",
            ["tenth"],
            registry=self._registry,
        )
        self.tenths = [scores.labels(str(tenth)).inc for tenth in range(1, 11)]
        self._model = Gauge(
            "slipway_model_info",
            "1: how the served model was made.",
            ["recipe", "precision", "engine"],
            registry=self._registry,
        )
        self._model_bytes = Gauge("slipway_model_bytes", "Size of the model's file.", registry=self._registry)
        self.events = Counter(
            "slipway_events_total", "Users' events accepted: they are in the log.", registry=self._registry
        )
        self._events_waiting = Gauge(
            "slipway_events_waiting", "Accepted events that wait for Redis.", registry=self._registry
        )
        self.events_lost = Counter(
            "slipway_events_without_history_total",
            "Accepted events that no history will have: Redis was away for too long.",
            registry=self._registry,
        )
        self.forgotten = Counter(
            "slipway_shown_forgotten_total", "Answers not kept for feedback: Redis was away.", registry=self._registry
        )

        self.cache = CacheMetrics(self._registry)

    def name(self, endpoint: str) -> None:
        """Count the workload's own endpoint, too."""
        self._endpoints.setdefault(endpoint, Endpoint())

    def answered(self, endpoint: str, code: int, seconds: float) -> None:
        """One request was answered."""
        if self.warming_up and endpoint == "infer":
            return
        told = self._endpoints[endpoint]
        told.codes[code] += 1
        told.seconds.observe(seconds)

    def left(self, waited_s: Sequence[float]) -> None:
        """One batch left the queue for the engine; how long each of its requests had waited, the oldest first."""
        if not self.warming_up:
            self._gathered.observe(waited_s[0])
            for seconds in waited_s:
                self._waited.observe(seconds)

    def ran(self, samples: int, seconds: float) -> None:
        """The engine ran one batch."""
        if not self.warming_up:
            self._sizes.observe(samples)
            self._engine.observe(seconds)

    def serves(self, package: Package) -> None:
        """Tell which model is served."""
        self._model.labels(package.recipe, package.precision, package.engine).set(1)
        self._model_bytes.set((package.folder / MODEL).stat().st_size)

    def watch_histories(self, length: Callable[[], float]) -> None:
        """Read the number of events that wait for Redis when scraped."""
        self._events_waiting.set_function(length)

    def watch_queue(self, length: Callable[[], float]) -> None:
        """Read the queue's length when scraped."""
        self._queue.set_function(length)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class CacheMetrics:
    """What the cache does, by level."""

    def __init__(self, registry: CollectorRegistry) -> None:
        found = Counter(
            "slipway_cache_answers_total",
            "Answers by where they came from; none: the engine, stale: an old one in its place.",
            ["level"],
            registry=registry,
        )
        self._found = {level: found.labels(level).inc for level in ("memory", "redis", "distributed", "none", "stale")}
        seconds = Histogram(
            "slipway_cache_seconds", "One look-up in a level.", ["level"], buckets=CACHE_SECONDS, registry=registry
        )
        self._seconds = {level: seconds.labels(level).observe for level in ("memory", "redis", "distributed")}
        shared = Counter("slipway_cache_coalesced_total", "Requests that shared an equal one's run.", registry=registry)
        self.coalesced = shared.inc
        errors = Counter("slipway_cache_errors_total", "Calls of a node that failed.", ["level"], registry=registry)
        lost = Counter("slipway_cache_dropped_total", "Values not written to a level.", ["level"], registry=registry)
        away = Gauge("slipway_cache_nodes_away", "Nodes that are left alone now.", ["level"], registry=registry)
        self._errors = {level: errors.labels(level).inc for level in ("redis", "distributed")}
        self._lost = {level: lost.labels(level).inc for level in ("redis", "distributed")}
        self._away = {level: away.labels(level).inc for level in ("redis", "distributed")}
        size = Gauge("slipway_cache_bytes", "What the cache holds in memory.", registry=registry)
        self.watch_size = size.set_function

    def found(self, level: str) -> None:
        """An answer came from a level."""
        self._found[level]()

    def looked(self, level: str, seconds: float) -> None:
        """A look-up in a level took so long."""
        self._seconds[level](seconds)

    def failed(self, level: str) -> None:
        """A call of a node failed."""
        self._errors[level]()

    def opened(self, level: str, change: int) -> None:
        """So many nodes more are left alone."""
        self._away[level](change)

    def dropped(self, level: str) -> None:
        """A value was not written."""
        self._lost[level]()
