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

from slipway.serving.redis import REST_S
from tests.conftest import needs, until
from tests.serving.conftest import Replica, Start
from tests.serving.packages import key

pytestmark = needs("redis-server")

HIT = 'slipway_feedback_total{outcome="hit",shown_version="7"}'
TRIES = 10
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
        until(self.answers)

    def answers(self) -> bool:
        with suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False

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


def feedback_status(replica: Replica, code: str) -> float:
    return replica.metric(f'slipway_requests_total{{code="{code}",endpoint="feedback"}}')


def shown(replica: Replica) -> tuple[str, list[str]]:
    answer = replica.post("/v1/recommend", {"history": [key(3)]}).json
    return answer["request_id"], [entry["item"] for entry in answer["items"]]


def test_feedback_is_a_hit_or_a_miss_and_counts_once(remembering: Replica, store: Store) -> None:
    # A replica gives Redis 200 ms. On a busy machine that is too little now and then: then feedback gets a 503, and the
    # next answer is asked about.
    for _ in range(TRIES):
        (request_id, items), (other_id, _) = shown(remembering), shown(remembering)
        hits, misses = remembering.metric(HIT), remembering.metric(MISS)
        if not (kept(store, request_id) and kept(store, other_id)):
            continue
        choices = [items[9], items[9], "another"]
        statuses = [feedback(remembering, request_id, item) for item in choices]
        once = remembering.metric(HIT) - hits, remembering.metric(MISS) - misses
        statuses.append(feedback(remembering, other_id, "another"))
        if 503 not in statuses:
            break
    assert statuses == [202] * 4
    assert once == (1, 0)
    assert (remembering.metric(HIT) - hits, remembering.metric(MISS) - misses) == (1, 1)
    with store.client() as client:  # what was used is forgotten at its time too
        assert 3500 < int(client.ttl(f"slipway:shown:{request_id}")) <= 3600


def kept(store: Store, request_id: str) -> bool:
    """Wait for what an answer showed, longer than a replica leaves Redis alone after a failure."""
    with store.client() as client:
        for _ in range(200):
            if client.exists(f"slipway:shown:{request_id}"):
                assert 3500 < int(client.ttl(f"slipway:shown:{request_id}")) <= 3600
                return True
            time.sleep(0.01)
    return False


def test_a_redis_that_is_late_loses_no_feedback(remembering: Replica, store: Store) -> None:
    forgotten = remembering.metric("slipway_shown_forgotten_total")
    with store.client() as client:
        client.execute_command("CLIENT", "PAUSE", "60")  # ms: three times what an answer would wait for it
        request_id, items = shown(remembering)
        assert kept(store, request_id)
        assert remembering.metric("slipway_shown_forgotten_total") == forgotten
        client.execute_command("CLIENT", "PAUSE", "60")
    assert feedback(remembering, request_id, items[0]) == 202


def test_feedback_on_what_was_never_shown_gets_404(remembering: Replica) -> None:
    until(lambda: feedback(remembering, "0" * 24, "item1") != 503)  # Redis may be late
    assert feedback_status(remembering, "404") == 1
    wrong = remembering.post("/v1/feedback", {"request_id": "a"})
    assert (wrong.status, wrong.json["error"]) == (400, "the body: Object missing required field `item`")


def test_recommendations_go_on_without_redis_and_feedback_comes_back_with_it(start: Start) -> None:
    with tempfile.TemporaryDirectory(prefix="slipway") as folder:
        store = Store(Path(folder) / "redis.sock")
        try:
            replica = start(SLIPWAY_REDIS=str(store.socket))
            replica.wait_until_ready()
            store.process.send_signal(signal.SIGSTOP)  # the worst case: connections open, no answers
            assert any(fails_soon(replica) for _ in range(5)), "redis-py as it comes would take 3 s each time"
            for _ in range(20):
                shown(replica)
                assert feedback(replica, "a", "b") == 503
            store.stop()
            shown(replica)
            store.start()
            until(lambda: taken(replica))
            assert replica.metric(HIT) == 1
            assert replica.metric("slipway_shown_forgotten_total") > 0
        finally:
            store.stop()


def fails_soon(replica: Replica) -> bool:
    """Whether feedback fails at once, also when Redis is really asked: not in the first second after a failure."""
    time.sleep(REST_S + 0.1)
    began = time.monotonic()
    assert feedback(replica, "a", "b") == 503
    return time.monotonic() - began < 0.5


def taken(replica: Replica) -> bool:
    request_id, items = shown(replica)
    time.sleep(0.1)
    return feedback(replica, request_id, items[0]) == 202


def test_without_redis_feedback_is_not_taken(replica: Replica) -> None:
    assert feedback(replica, "a", "b") == 503
