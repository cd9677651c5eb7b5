"""What both tracks did, as Prometheus scraped it from the gateway and the replicas.

Counts are differences of the raw counters between two moments, summed here series by series: Prometheus' own
`increase()` extrapolates, and a canary is judged on whole requests. A counter that fell was reset by a restart.
"""

from __future__ import annotations

import time
import urllib.error
from collections import Counter
from collections.abc import Mapping

from slipway import prometheus
from slipway.errors import PlatformError, TransientError
from slipway.platforms.base import Routing
from slipway.release.analysis import Histogram, Track, Window

REQUESTS, ATTEMPTS = "slipway_gateway_requests_total", "slipway_gateway_attempts_total"
SECONDS, FEEDBACK = "slipway_gateway_request_seconds_bucket", "slipway_feedback_total"
WEIGHT = "slipway_gateway_canary_weight"
EVERYTHING = f'{{__name__=~"{REQUESTS}|{ATTEMPTS}|{SECONDS}|{FEEDBACK}"}}'
PATIENCE_S = 10.0

Series = frozenset[tuple[str, str]]


class Prometheus:
    """Reads series by all their labels, and waits for a server that is busy."""

    def __init__(self, url: str) -> None:
        self._url, self._client = url, prometheus.Prometheus(url)

    def read(self, query: str) -> dict[Series, float]:
        """Read the latest value of each series that matches.

        Raises:
            TransientError: no answer for `PATIENCE_S`.
            PlatformError: it refuses the query.
        """
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._read(query)
            except urllib.error.HTTPError as error:
                raise PlatformError(f"Prometheus at {self._url} refuses a query: {error.read()[:200]!r}") from error
            except (OSError, ValueError, KeyError) as error:
                if time.monotonic() > until:
                    raise TransientError(
                        f"Prometheus at {self._url} does not answer ({error}); see `make up`"
                    ) from error
                time.sleep(0.2)

    def sees_weight(self, weight: float) -> bool:
        """Whether the last scrape of the gateway saw the canary at `weight`."""
        return any(abs(seen - weight) < 1e-9 for seen in self.read(WEIGHT).values())

    def _read(self, query: str) -> dict[Series, float]:
        found = self._client.now(query)
        return {frozenset({"__name__": each.name, **each.labels}.items()): each.value for each in found}


class Meter:
    """Counts what happened since it was made; every `window` reads anew."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self._last = prometheus.read(EVERYTHING)
        self._counts: Counter[Series] = Counter()

    def window(self, routing: Routing) -> Window:
        """Read the counts of the routed versions since the beginning."""
        self._update()
        assert routing.canary is not None
        champion = self._track("champion", routing.champion) if routing.champion else None
        return Window(self._track("canary", routing.canary), champion)

    def _update(self) -> None:
        now = self._prometheus.read(EVERYTHING)
        for series, value in now.items():
            before = self._last.get(series, 0.0)
            self._counts[series] += round(value - before if value >= before else value)
        self._last.update(now)

    def _track(self, track: str, version: str) -> Track:
        """Sum the series of one track: what clients saw goes by track, what replicas did by version."""
        requests = self._by("code", __name__=REQUESTS, track=track)
        attempts = self._by("outcome", __name__=ATTEMPTS, version=version)
        feedback = self._by("outcome", __name__=FEEDBACK, shown_version=version)
        return Track(
            requests=sum(requests.values()),
            failed=sum(count for code, count in requests.items() if code.startswith("5") or code == "429"),
            attempts=sum(attempts.values()),
            errors=sum(attempts.values()) - attempts["ok"],
            latency=_histogram(self._by("le", __name__=SECONDS, track=track)),
            feedbacks=sum(feedback.values()),
            hits=feedback["hit"],
        )

    def _by(self, label: str, **wanted: str) -> Counter[str]:
        sums: Counter[str] = Counter()
        for series, count in self._counts.items():
            labels = dict(series)
            if _counted(labels) and wanted.items() <= labels.items():
                sums[labels[label]] += count
        return sums


def _counted(labels: Mapping[str, str]) -> bool:
    """Leave feedback out, which is no answer of a model, and the latency of batch requests, which may take its time."""
    kind = labels.get("class", "realtime")
    return kind == "realtime" or (kind == "batch" and labels["__name__"] == REQUESTS)


def _histogram(by_bound: Mapping[str, int]) -> Histogram:
    """Turn Prometheus' cumulative buckets in seconds into counts by bound in ms."""
    cumulative = sorted((float(bound) * 1e3, count) for bound, count in by_bound.items())
    counts = [count for _, count in cumulative]
    return Histogram(
        tuple(round(bound, 6) for bound, _ in cumulative),
        tuple(max(0, count - before) for before, count in zip([0, *counts], counts, strict=False)),
    )
