"""Scale the champion of the local stack by a HorizontalPodAutoscaler: `python -m slipway.scaling --port 18087`.

It looks every few seconds, and at once when Alertmanager says that an alert fires.

    POST /alerts    look now (Alertmanager's webhook; what it says is not read)
    GET  /health    200 while it looks
    GET  /metrics   what it saw and did, for Prometheus

environment:
  SLIPWAY_HOME     the state folder
  SLIPWAY_PARAMS   JSON of params.yaml as `up` read it (absent: the file is read)
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

from slipway import config
from slipway.config import Params
from slipway.errors import ParamsError, SlipwayError
from slipway.platforms.local.platform import LocalPlatform
from slipway.prometheus import Prometheus
from slipway.scaling import policy
from slipway.scaling.autoscaler import Autoscaler, Look
from slipway.scaling.policy import Policy
from slipway.serving import logs

HOST = "127.0.0.1"
EVERY_S = 5.0
AT_ONCE_S = 0.5
"""However many alerts fire, it does not look sooner after the last time."""
_HANGS_S = 30.0  # beyond the wait for a replica: longer than that no look takes

log = logging.getLogger("slipway.scaling")


class Told:
    """What Prometheus is told."""

    def __init__(self, bounds: Policy) -> None:
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
        limits = Gauge("slipway_autoscaler_limit_replicas", "Its bounds.", ["bound"], registry=self.registry)
        limits.labels("min").set(bounds.spec.min_replicas)
        limits.labels("max").set(bounds.spec.max_replicas)
        for direction in ("out", "in"):
            self._changes.labels(direction)

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
        if by := found.decision.replicas - found.serving.wanted:
            self._changes.labels("out" if by > 0 else "in").inc()

    def failed(self) -> None:
        """Tell of a look that failed."""
        self._failures.inc()


class Loop:
    """Looks in turns, until the process ends."""

    def __init__(self, autoscaler: Autoscaler, told: Told) -> None:
        self._autoscaler, self._told = autoscaler, told
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
            try:
                self._told.looked(self._autoscaler.look())
            except SlipwayError as error:
                self._told.failed()
                log.error("no decision: %s", error)
            except Exception:  # it must outlive whatever the stack is in the midst of
                self._told.failed()
                log.exception("no decision")
            self._last = time.monotonic()
            time.sleep(AT_ONCE_S)
            self._called.wait(EVERY_S - AT_ONCE_S)
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


def main() -> int:
    """Parse the command line and scale until a signal; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m slipway.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    port = parser.parse_args().port
    try:
        params = config.handed()
        if params.deploy.autoscaling is None:
            raise ParamsError("deploy.autoscaling: there is no policy; name a file, such as infra/kubernetes/hpa.yaml")
        bounded = policy.read(Path(params.deploy.autoscaling)).at_most(most(params))
        _serve(port, params, bounded)
    except SlipwayError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(port: int, params: Params, bounded: Policy) -> None:
    logs.configure("INFO", os.environ.get("SLIPWAY_LOG_FORMAT", "text"), {})
    platform = LocalPlatform(params)
    ready_s = params.deploy.ready_timeout_s
    told = Told(bounded)
    prometheus = Prometheus(platform.prometheus_url)
    loop = Loop(Autoscaler(bounded, platform, prometheus, params.serve.threads, ready_s), told)
    within_s = EVERY_S + ready_s + params.serve.drain_s + _HANGS_S
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer((HOST, port), handler(loop, told, within_s))
    log.info(
        "follows %s: %d to %d replicas", bounded.metadata.name, bounded.spec.min_replicas, bounded.spec.max_replicas
    )
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    loop.run()


if __name__ == "__main__":
    sys.exit(main())
