"""What is asked of Prometheus: values now, values over some minutes, and alerts. It never waits for long."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipway import loopback

TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Sample:
    """One series and its value now."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Line:
    """One series over some moments; None where it has no value."""

    name: str
    labels: Mapping[str, str]
    values: Sequence[float | None]


class Prometheus:
    """A client of the HTTP API.

    Every method raises OSError, ValueError or KeyError when there is no answer that makes sense.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def now(self, query: str) -> list[Sample]:
        """The latest value of each series."""
        found = self._get("query", query=query)["result"]
        return [Sample(*_named(each["metric"]), float(each["value"][1])) for each in found]

    def over(self, query: str, times: Sequence[int]) -> list[Line]:
        """The values at evenly spaced moments (Unix time, s)."""
        step = times[1] - times[0]
        found = self._get("query_range", query=query, start=str(times[0]), end=str(times[-1]), step=str(step))["result"]
        lines = []
        for each in found:
            at = {int(moment): float(value) for moment, value in each["values"]}
            values = [at.get(time) for time in times]
            # JSON has no NaN, which a quantile of nothing is.
            lines.append(Line(*_named(each["metric"]), [None if v is None or v != v else v for v in values]))
        return lines

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that fire or are about to, as Prometheus tells them."""
        alerts: list[dict[str, Any]] = self._get("alerts")["alerts"]
        return alerts

    def _get(self, call: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{call}?{urllib.parse.urlencode(parameters)}"
        with loopback.urlopen(url, timeout=TIMEOUT_S) as answer:
            return json.load(answer)["data"]


def _named(metric: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    return metric.get("__name__", ""), {key: value for key, value in metric.items() if key != "__name__"}
