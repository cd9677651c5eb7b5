"""The generator of load against a service that stalls, refuses or is not there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks import load
from tests.conftest import free_port

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@contextmanager
def service(answer: Callable[[int], tuple[bytes, float]]) -> Iterator[int]:
    """Answer the requests one after another, as a service with one thread does; gives the port."""
    ports: list[int] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()
    turn, count = asyncio.Lock(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(2)
                async with turn:
                    reply, seconds = answer(count)
                    count += 1
                    await asyncio.sleep(seconds)
                writer.write(reply)
                if reply == BUSY:
                    break
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await ended.wait()
        server.close()

    ended = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert ready.wait(10)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()


REQUESTS = [load.post("/v1/recommend", b"{}")]


def test_a_stall_is_seen_by_all_who_would_have_come_meanwhile() -> None:
    with service(lambda number: (OK, 0.5 if number == 50 else 0.0)) as port:
        seen = load.open_loop(("127.0.0.1", port), REQUESTS, load.poisson(200, 1.0))
    assert seen.statuses == {200: len(seen.due_s)}
    assert (seen.latency_s > 0.2).sum() > 30, "a closed loop would have sent one"


def test_what_is_refused_or_not_answered_is_told_and_is_no_latency() -> None:
    with service(lambda number: (BUSY if number % 2 else OK, 0.0)) as port:
        seen = load.open_loop(("127.0.0.1", port), REQUESTS, load.poisson(200, 0.5))
        assert set(seen.statuses) == {200, 429}
        assert seen.good_rps() == pytest.approx(100, rel=0.4)
    with pytest.raises(ConnectionRefusedError):
        load.open_loop(("127.0.0.1", free_port()), REQUESTS, load.poisson(200, 0.5))


def test_figures_in_which_the_generator_was_late_are_refused() -> None:
    due_s, latency_s = load.poisson(100, 10.0), np.full(10_000, 0.010)[: len(load.poisson(100, 10.0))]
    status = np.full(len(due_s), 200)
    assert load.Seen(due_s, np.full(len(due_s), 0.0009), latency_s, status).check().lag_p99_ms == pytest.approx(0.9)
    with pytest.raises(load.LagError, match=r"lagged by 1\.10 ms beside a P99 of 10\.00 ms"):
        load.Seen(due_s, np.full(len(due_s), 0.0011), latency_s, status).check()


def test_a_schedule_is_drawn_beforehand_and_has_the_rate_and_the_spread_of_independent_users() -> None:
    due_s = load.poisson(1000, 20.0, seed=3)
    assert np.array_equal(due_s, load.poisson(1000, 20.0, seed=3))
    assert len(due_s) == pytest.approx(20_000, rel=0.03)
    gaps = np.diff(due_s)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    together = load.bursts(1000, 20, 20.0)
    assert len(together) == pytest.approx(20_000, rel=0.15)
    assert (np.diff(together) == 0).mean() == pytest.approx(19 / 20, abs=0.01)
