"""The generator of traffic: an open loop that hides no stall, against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from slipway.errors import DataError
from slipway.release.replay import FEEDBACK_PATH, Replay, Sample, quantile, read
from tests.conftest import free_port, until

SAMPLES: list[Sample] = [
    {"user": f"u{n}", "request": {"user": f"u{n}", "history": ["a"]}, "truth": f"t{n}"} for n in range(20)
]


@dataclass
class Server:
    """Answers every request; may be told to stall or to fail."""

    port: int = field(default_factory=free_port)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    feedback: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    free: asyncio.Event = field(default_factory=asyncio.Event)
    end: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, request: web.Request) -> web.Response:
        await self.free.wait()
        self.requests.append((request.headers["X-User"], await request.json()))
        body = {"request_id": f"r{len(self.requests)}"}
        return web.json_response(body, status=self.status, headers={"X-Slipway-Version": "3"})

    async def feed_back(self, request: web.Request) -> web.Response:
        self.feedback.append(await request.json())
        return web.Response(status=202)

    async def serve(self, started: threading.Event) -> None:
        app = web.Application()
        app.add_routes([web.post("/ask", self.ask), web.post(FEEDBACK_PATH, self.feed_back)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self.free.set()
        started.set()
        await self.end.wait()
        await runner.cleanup()


@pytest.fixture
def server() -> Iterator[Server]:
    made, started = Server(), threading.Event()
    thread = threading.Thread(target=lambda: made.loop.run_until_complete(made.serve(started)))
    thread.start()
    assert started.wait(10)
    yield made
    made.loop.call_soon_threadsafe(made.end.set)
    thread.join()
    made.loop.close()


def test_it_keeps_its_rate_and_feeds_back_what_truly_came_next(server: Server) -> None:
    with Replay(server.url, "/ask", SAMPLES, rate_rps=100, feedback_s=0.2) as traffic:
        until(lambda: len(traffic.answers) >= 200)
    figures = traffic.figures()
    print(figures)
    assert figures.requests / max(answer.due_s for answer in traffic.answers) == pytest.approx(100, rel=0.2)
    lags_ms = sorted(answer.lag_ms for answer in traffic.answers)
    assert lags_ms[0] >= 0, "sent before it was due"
    assert quantile(lags_ms, 0.5) < 250, "it does not keep up: half of the requests, not those of a moment, were late"
    assert figures.failed == traffic.feedback_failed == 0
    assert len(server.feedback) == figures.requests
    assert {choice["item"] for choice in server.feedback} <= {sample["truth"] for sample in SAMPLES}


def test_every_round_through_the_samples_is_made_by_new_users(server: Server) -> None:
    with Replay(server.url, "/ask", SAMPLES, rate_rps=200) as traffic:
        until(lambda: len(traffic.answers) > 2 * len(SAMPLES))
    users = [user for user, _ in server.requests]
    assert len(users) == len(set(users)) == traffic.figures().requests > len(SAMPLES)
    assert all(request["user"] == user for user, request in server.requests)


def test_a_stall_is_charged_to_every_request_that_was_due_meanwhile(server: Server) -> None:
    with Replay(server.url, "/ask", SAMPLES, rate_rps=100) as traffic:
        until(lambda: len(traffic.answers) > 20)
        server.loop.call_soon_threadsafe(server.free.clear)
        time.sleep(0.5)
        server.loop.call_soon_threadsafe(server.free.set)
        served = len(traffic.answers)
        until(lambda: len(traffic.answers) > served + 50)
    figures = traffic.figures()
    print(figures)
    assert figures.failed == 0
    assert figures.p99_ms > 400, "a closed loop would have sent one request during the stall, not fifty"
    assert sum(answer.latency_ms > 100 for answer in traffic.answers) > 20


def test_what_is_not_an_answer_counts_as_failed(server: Server) -> None:
    server.status = 503
    with Replay(server.url, "/ask", SAMPLES, rate_rps=100) as traffic:
        until(lambda: len(traffic.answers) > 10)
    assert traffic.figures().failed == traffic.figures().requests > 0
    with Replay(f"http://127.0.0.1:{free_port()}", "/ask", SAMPLES, rate_rps=100) as nobody:
        until(lambda: len(nobody.answers) > 10)
    assert nobody.figures().failed_ratio == 1.0
    assert "Cannot connect" in nobody.answers[0].error, nobody.answers[0]


def test_a_rate_of_zero_sends_nothing(server: Server) -> None:
    with Replay(server.url, "/ask", SAMPLES, rate_rps=0) as traffic:
        time.sleep(0.1)
    assert traffic.figures().requests == 0


@pytest.mark.parametrize("text", ["", "not json\n", '{"user": "u"}\n', "[1]\n"])
def test_samples_that_cannot_be_read_are_named_with_their_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "replay.jsonl"
    path.write_text(json.dumps(SAMPLES[0]) + "\n" + text if text else "")
    with pytest.raises(DataError, match="replay.jsonl:2" if text else "holds no samples"):
        read(path)


def test_quantiles_are_nearest_ranks() -> None:
    assert quantile([], 0.99) == 0.0
    assert quantile([1.0], 0.5) == 1.0
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0
