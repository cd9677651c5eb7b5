"""Scale the champion of the local stack by a HorizontalPodAutoscaler: `python -m slipway.scaling --port 18087`.

It looks every few seconds, and at once when Alertmanager says that an alert fires. With two pools for realtime requests
(params.yaml: pools.kinds) it lets the one sleep that is not needed, instead; it looks every second then.

    POST /alerts    look now (Alertmanager's webhook; what it says is not read)
    GET  /health    200 while it looks
    GET  /metrics   what it saw and did, for Prometheus

environment:
  SLIPWAY_HOME     the state folder
  SLIPWAY_PARAMS   JSON of params.yaml as `up` read it (absent: the file is read)
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

from slipway.errors import ParamsError, SlipwayError
from slipway.params import Params
from slipway.platforms.local import programs
from slipway.platforms.local.platform import LocalPlatform
from slipway.prometheus import Prometheus
from slipway.scaling import policy
from slipway.scaling.autoscaler import Autoscaler, Look
from slipway.scaling.policy import Policy
from slipway.scaling.pools import Pools
from slipway.serving import logs

HOST = "127.0.0.1"
EVERY_S = 5.0
POOLS_EVERY_S = 1.0
"""Users wait for the pool that is to wake; what fails is tried again after EVERY_S."""
AT_ONCE_S = 0.5
"""However many alerts fire, it does not look sooner after the last time."""
_HANGS_S = 30.0  # beyond the wait for a replica: longer than that no look takes

log = logging.getLogger("slipway.scaling")


class Told:
    """What Prometheus is told."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._replicas = Gauge(
            "slipway_autoscaler_replicas",
            "Replicas of the champion that it wants.",
            ["version"],
            registry=self.registry,
        )
        self._ratio = Gauge(
            "slipway_autoscaler_metric_ratio", "A metric against its target.", ["metric"], registry=self.registry
        )
        self._asked = Gauge(
            "slipway_autoscaler_metric_replicas",
            "Replicas that a metric asks for: the most that one does count.",
            ["metric"],
            registry=self.registry,
        )
        self._changes = Counter(
            "slipway_autoscaler_changes", "Times that it scaled.", ["direction"], registry=self.registry
        )
        self._failures = Counter("slipway_autoscaler_failures", "Looks that failed.", registry=self.registry)
        self._limits = Gauge("slipway_autoscaler_limit_replicas", "Its bounds.", ["bound"], registry=self.registry)
        for direction in ("out", "in"):
            self._changes.labels(direction)

    def follows(self, bounds: Policy) -> None:
        """Tell of the policy."""
        self._limits.labels("min").set(bounds.spec.min_replicas)
        self._limits.labels("max").set(bounds.spec.max_replicas)

    def looked(self, found: Look | None) -> None:
        """Tell of a look."""
        self._replicas.clear()
        self._ratio.clear()
        self._asked.clear()
        if found is None:
            return
        self._replicas.labels(found.serving.version).set(found.decision.replicas)
        for reading in found.readings:
            if reading.value is not None:
                self._ratio.labels(reading.name).set(reading.value / reading.target)
            if reading.replicas is not None:
                self._asked.labels(reading.name).set(reading.replicas)
        self.changed(found.decision.replicas - found.serving.wanted)

    def changed(self, by: int) -> None:
        """Tell that replicas, or pools, came (or went: negative)."""
        if by:
            self._changes.labels("out" if by > 0 else "in").inc()

    def failed(self) -> None:
        """Tell of a look that failed."""
        self._failures.inc()


class Loop:
    """Looks in turns, until the process ends."""

    def __init__(self, look: Callable[[], None], told: Told, every_s: float) -> None:
        self._look, self._told, self._every_s = look, told, every_s
        self._called, self._last = threading.Event(), time.monotonic()

    def call(self) -> None:
        """Look as soon as may be."""
        self._called.set()

    def looks(self, within_s: float) -> bool:
        """Whether the last look is not too long ago."""
        return time.monotonic() - self._last < within_s

    def run(self) -> None:
        """Look, rest, and so on."""
        while True:
            rest_s = EVERY_S
            try:
                self._look()
                rest_s = self._every_s
            except SlipwayError as error:
                self._told.failed()
                log.error("no decision: %s", error)
            except Exception:  # it must outlive whatever the stack is in the midst of
                self._told.failed()
                log.exception("no decision")
            self._last = time.monotonic()
            time.sleep(AT_ONCE_S)
            self._called.wait(rest_s - AT_ONCE_S)
            self._called.clear()


def handler(loop: Loop, told: Told, within_s: float) -> type[BaseHTTPRequestHandler]:
    """Make the handler of requests."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, generate_latest(told.registry), "text/plain; version=0.0.4; charset=utf-8")
            elif self.path == "/health":
                self._answer(200, b"looks\n") if loop.looks(within_s) else self._answer(503, b"hangs\n")
            else:
                self._answer(404, b"no such page\n")

        def do_POST(self) -> None:
            if self.path != "/alerts":
                self._answer(404, b"no such page\n")
                return
            loop.call()
            self._answer(200, b"")

        def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody wants a line a second."""

    return Handler


def most(params: Params) -> int:
    """Replicas for which this machine has processors, one a thread; what a cluster has no room for waits there, too."""
    return max(1, len(os.sched_getaffinity(0)) // params.serve.threads)


def serve(port: int, params: Params) -> None:
    """Scale until a signal.

    Raises:
        ParamsError: there is no policy, or it cannot be read.
    """
    logs.configure("INFO", os.environ.get("SLIPWAY_LOG_FORMAT", "text"), {})
    told = Told()
    loop = _pools(params, told) if params.pools_sleep else _champion(params, told)
    within_s = EVERY_S + params.deploy.ready_timeout_s + params.serve.drain_s + _HANGS_S
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer((HOST, port), handler(loop, told, within_s))
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    loop.run()


def _champion(params: Params, told: Told) -> Loop:
    if params.deploy.autoscaling is None:
        raise ParamsError("deploy.autoscaling: there is no policy; name a file, such as infra/kubernetes/hpa.yaml")
    bounds = policy.read(Path(params.deploy.autoscaling)).at_most(most(params))
    platform, limits = LocalPlatform(params), params.deploy
    prometheus = Prometheus(platform.prometheus_url)
    autoscaler = Autoscaler(bounds, platform, prometheus, params.serve.threads, limits.ready_timeout_s)
    told.follows(bounds)
    log.info("follows %s: %d to %d replicas", bounds.metadata.name, bounds.spec.min_replicas, bounds.spec.max_replicas)
    return Loop(lambda: told.looked(autoscaler.look()), told, EVERY_S)


def _pools(params: Params, told: Told) -> Loop:
    pools = Pools(LocalPlatform(params), params.deploy.ready_timeout_s)
    log.info("lets the pool sleep that is not needed")
    return Loop(lambda: told.changed(pools.look()), told, POOLS_EVERY_S)


if __name__ == "__main__":
    sys.exit(programs.main("scaling", __doc__, serve))
