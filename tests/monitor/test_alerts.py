"""Every alert that can come within seconds, seen firing: one stack, served badly on purpose."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from slipway import loopback
from slipway.platforms.base import Fault, Routing
from slipway.platforms.local import stack
from tests.conftest import needs, until
from tests.platforms import stand
from tests.platforms.stand import Here

pytestmark = needs("nginx", "redis-server", "prometheus")


MAY_FIRE = {"ScoreDrift", "FeedbackLost"}
"""Scores drift until the end, and Redis may be slow on a busy machine."""


def firing(here: Here) -> set[str]:
    with loopback.urlopen(f"{here.platform.prometheus_url}/api/v1/alerts", timeout=10) as answer:
        alerts: list[Any] = json.load(answer)["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def wait_for(here: Here, *names: str) -> None:
    until(lambda: set(names) <= firing(here), 120)


@contextmanager
def asked(url: str, body: dict[str, Any], clients: int) -> Iterator[None]:
    """Ask in a closed loop as long as the block runs; answers are not looked at."""
    done, text = threading.Event(), json.dumps(body).encode()

    def ask() -> None:
        while not done.is_set():
            with suppress(urllib.error.URLError, TimeoutError, ConnectionError, socket.timeout):
                loopback.urlopen(url, text, timeout=5).close()

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(ask)
        try:
            yield
        finally:
            done.set()


@pytest.fixture(scope="module")
def served(here: Here) -> Here:
    stack.up(here.params, ["page", "state"], tell=lambda _: None)
    for version in ("1", "2"):
        stand.publish(version)
        here.platform.deploy("ranker", version, 1, timeout_s=60)
    here.platform.route(Routing("1", "2", 0.5))
    return here


@pytest.mark.slow
def test_alerts_fire_on_a_stack_that_suffers_and_end_when_it_is_well(served: Here) -> None:
    url = f"{served.platform.gateway_url}/v1/recommend"
    pids = {row.name: row.pid for row in stack.status(served.params)}
    alike = {"history": ["item7"], "k": 3}  # the same again and again: scores fall into one tenth
    with asked(url, alike, clients=4):
        wait_for(served, "ScoreDrift")
        assert firing(served) <= MAY_FIRE

        champion, canary = (served.platform.status().replicas[version][0] for version in ("1", "2"))
        for name in ("redis", "state"):
            os.kill(pids[name], signal.SIGSTOP)
        served.platform.inject(canary, Fault.STALL)
        wait_for(served, "FeedbackLost", "ProgramDown", "StateDown", "NoReadyReplica", "ReplicaDown")
        for name in ("redis", "state"):
            os.kill(pids[name], signal.SIGCONT)

        served.platform.inject(champion, Fault.STALL)
        wait_for(served, "ErrorRatio")
        served.platform.heal(champion)
        served.platform.heal(canary)

        os.kill(pids["gateway"], signal.SIGKILL)  # its workers end with it
        while "GatewayDown" not in firing(served):
            for row in stack.status(served.params):
                if row.name == "gateway" and row.pid not in (0, pids["gateway"]):
                    with suppress(ProcessLookupError):
                        os.kill(row.pid, signal.SIGKILL)
    until(lambda: firing(served) <= MAY_FIRE, 120)
