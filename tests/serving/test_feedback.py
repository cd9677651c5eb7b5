"""Feedback through a real Redis, and service without one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from tests.conftest import needs
from tests.serving.conftest import Replica, Start
from tests.serving.packages import key

pytestmark = needs("redis-server")

HIT = 'slipway_feedback_total{outcome="hit",shown_version="7"}'
MISS = 'slipway_feedback_total{outcome="miss",shown_version="7"}'


class Store:
    """A Redis server on a unix socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server", path="/usr/bin:/usr/sbin:/bin")
        assert program
        self.process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self.socket.parent)],
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with suppress(redis.RedisError), self.client() as client:
                client.ping()
                return
            time.sleep(0.02)
        pytest.fail("redis-server did not start")

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    # Not under pytest's folder: the path of a unix socket may have 107 bytes only.
    with tempfile.TemporaryDirectory(prefix="slipway") as folder:
        running = Store(Path(folder) / "redis.sock")
        yield running
        running.stop()


@pytest.fixture(scope="module")
def remembering(package: Path, store: Store) -> Iterator[Replica]:
    running = Replica(package, store.socket.with_name("log"), SLIPWAY_REDIS=str(store.socket))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def feedback(replica: Replica, request_id: str, item: str | int) -> int:
    return replica.post("/v1/feedback", {"request_id": request_id, "item": item}).status


def shown(replica: Replica) -> tuple[str, list[str]]:
    answer = replica.post("/v1/recommend", {"history": [key(3)]}).json
    return answer["request_id"], [entry["item"] for entry in answer["items"]]


def test_feedback_is_a_hit_or_a_miss_and_counts_once(remembering: Replica, store: Store) -> None:
    request_id, items = shown(remembering)
    other_id, _ = shown(remembering)
    with store.client() as client:
        wait_for_key(client, other_id)
        assert 3500 < int(client.ttl(f"slipway:shown:{request_id}")) <= 3600
    assert feedback(remembering, request_id, items[9]) == 202
    assert feedback(remembering, request_id, items[9]) == 202
    assert feedback(remembering, request_id, "another") == 202
    assert (remembering.metric(HIT), remembering.metric(MISS)) == (1, 0)
    assert feedback(remembering, other_id, "another") == 202
    assert (remembering.metric(HIT), remembering.metric(MISS)) == (1, 1)
    with store.client() as client:  # what was used is forgotten at its time too
        assert 3500 < int(client.ttl(f"slipway:shown:{request_id}")) <= 3600


def wait_for_key(client: redis.Redis, request_id: str) -> None:
    end = time.monotonic() + 5
    while not client.exists(f"slipway:shown:{request_id}"):
        assert time.monotonic() < end, "what was shown never reached Redis"
        time.sleep(0.005)


def test_feedback_on_what_was_never_shown_gets_404(remembering: Replica) -> None:
    assert feedback(remembering, "0" * 24, "item1") == 404
    assert remembering.metric('slipway_requests_total{code="404",endpoint="feedback"}') == 1
    wrong = remembering.post("/v1/feedback", {"request_id": "a"})
    assert (wrong.status, wrong.json["error"]) == (400, "the body: Object missing required field `item`")


def test_recommendations_go_on_without_redis_and_feedback_comes_back_with_it(start: Start) -> None:
    with tempfile.TemporaryDirectory(prefix="slipway") as folder:
        store = Store(Path(folder) / "redis.sock")
        try:
            replica = start(SLIPWAY_REDIS=str(store.socket))
            replica.wait_until_ready()
            store.process.send_signal(signal.SIGSTOP)  # the worst case: connections open, no answers
            assert feedback(replica, "a", "b") == 503
            began = time.monotonic()
            for _ in range(20):
                shown(replica)
                assert feedback(replica, "a", "b") == 503
            assert time.monotonic() - began < 2.0
            store.stop()
            shown(replica)
            store.start()
            end = time.monotonic() + 10
            while time.monotonic() < end:
                request_id, items = shown(replica)
                time.sleep(0.1)
                if feedback(replica, request_id, items[0]) == 202:
                    break
            assert replica.metric(HIT) == 1
            assert replica.metric("slipway_shown_forgotten_total") > 0
        finally:
            store.stop()


def test_without_redis_feedback_is_not_taken(replica: Replica) -> None:
    assert feedback(replica, "a", "b") == 503
