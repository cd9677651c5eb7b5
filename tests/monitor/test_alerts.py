"""Every alert, seen firing on one stack that is served badly on purpose, and ending when it is well."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from slipway import artifacts, config, loopback
from slipway.params import CacheParams, SloParams
from slipway.platforms.base import Fault, Replica, Routing
from slipway.platforms.local import gateway, stack
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.platform import LocalPlatform
from slipway.prometheus import Prometheus
from tests.conftest import needs, until
from tests.monitor.test_rules import alerts
from tests.platforms import stand
from tests.platforms.stand import Here
from tests.serving.packages import key

pytestmark = needs("nginx", "redis-server", "prometheus")


UNKEPT = {"ScoreDrift", "LatencyHigh"}
"""Scores drift, and users wait for longer than they were promised, until the end."""
MAY_FIRE = {*UNKEPT, "FeedbackLost"}
"""Redis may be slow on a busy machine."""

Body = dict[str, Any]


class Watch:
    """What fires, and what did at any look."""

    def __init__(self, here: Here) -> None:
        self.prometheus = Prometheus(here.platform.prometheus_url)
        self.seen: set[str] = set()

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        found = {alert["labels"]["alertname"] for alert in self.prometheus.alerts() if alert["state"] == "firing"}
        self.seen |= found
        return found

    def wait_for(self, *names: str) -> None:
        """Wait until all of them fire at once."""
        try:
            until(lambda: set(names) <= self.firing())
        except AssertionError:
            pytest.fail(f"not firing: {set(names) - self.firing()}; alerts: {self.prometheus.alerts()}")

    def wait_for_the_end(self) -> None:
        """Wait until nothing fires but what may, and what looks back for five minutes."""
        until(lambda: self.firing() <= MAY_FIRE | {"ReplicaRestarting"})

    def wait_for_restarts(self, replica: Replica, count: int) -> None:
        """Wait until Prometheus has seen a replica started anew so often."""
        query = f'changes(process_start_time_seconds{{replica="{replica.name}"}}[5m]) >= {count}'
        until(lambda: self.prometheus.now(query))


def alike() -> Body:
    """The same again and again: scores fall into one tenth."""
    return {"history": ["item7"], "k": 3}


def different() -> Body:
    """Seldom the same, so that the cache has no answer."""
    return {"history": [key(random.randrange(1, 300)) for _ in range(3)], "k": 3}


@contextmanager
def asked(url: str, body: Callable[[], Body], clients: int) -> Iterator[None]:
    """Ask in a closed loop as long as the block runs; answers are not looked at."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            with suppress(urllib.error.URLError, TimeoutError, ConnectionError, socket.timeout):
                loopback.urlopen(url, json.dumps(body()).encode(), timeout=5).close()

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(ask)
        try:
            yield
        finally:
            done.set()


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Programs that keep their sockets and answer nothing."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A stack that promised its users a tenth of a millisecond, and whose canary has a queue for one request."""
    params = stand.params()
    serve = params.serve.model_copy(update={"cache": CacheParams(memory_mb=1, ttl_s=1, nodes=1)})
    params = params.model_copy(update={"serve": serve, "slo": SloParams(p99_ms=0.1)})
    narrow = params.model_copy(update={"serve": serve.model_copy(update={"max_queue": 1})})
    with stand.running(tmp_path_factory.mktemp("home"), params, [*stand.SERVICE, "state", "cache0", "page"]) as up:
        for version, own in (("1", params), ("2", narrow)):
            stand.publish(version)
            LocalPlatform(own).deploy("ranker", version, 1, timeout_s=60)
        up.platform.route(Routing("1", "2", 0.5))
        yield up


@pytest.mark.slow
def test_every_alert_fires_on_a_stack_that_suffers_and_ends_when_it_is_well(served: Here) -> None:
    platform, url, watch = served.platform, f"{served.platform.gateway_url}/v1/recommend", Watch(served)
    pids = {row.name: row.pid for row in stack.status(served.params)}
    champion, canary = (platform.status().replicas[version][0] for version in ("1", "2"))
    with asked(url, alike, clients=4):
        watch.wait_for(*UNKEPT)
        assert watch.firing() <= MAY_FIRE

        layout = Layout(config.home())
        document = artifacts.read_json(layout.platform_file)
        pools = {"realtime": ["absent", "all"], "prices": {"absent": 1.0, "all": 1.0}, "high_rps": 1e6}
        gateway.put(layout, document | {"pools": document["pools"] | pools})
        with asked(url, different, clients=8):
            watch.wait_for("QueueFull")
        with stopped([pids[name] for name in ("redis", "state", "cache0")]):
            platform.inject(canary, Fault.STALL)
            watch.wait_for("FeedbackLost", "CacheDown", "CacheAway", "ProgramDown", "StateDown")
            watch.wait_for("NoReadyReplica", "ReplicaDown")

        platform.inject(champion, Fault.STALL)
        watch.wait_for("ErrorRatio")
        platform.heal(champion)
        platform.heal(canary)

        watch.wait_for("PoolNotReady")  # it is patient
        artifacts.write_json(layout.platform_file, document | {"routed": time.time() - 3600})
        os.killpg(pids["gateway"], signal.SIGSTOP)
        for kills in range(3):
            watch.wait_for_restarts(canary, kills)
            platform.inject(canary, Fault.KILL)
        watch.wait_for("GatewayDown", "ReplicaRestarting")
        os.killpg(pids["gateway"], signal.SIGKILL)  # the next one knows since when
        watch.wait_for("CanaryStuck")
    platform.route(Routing("1"))
    watch.wait_for_the_end()
    assert watch.seen == set(alerts())
