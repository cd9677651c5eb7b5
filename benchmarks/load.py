"""Load for a service on this machine, and what its users saw of it.

`open_loop` sends each request at a moment that was drawn beforehand, whatever became of the ones before, and counts a
latency from that moment: a stall of the service is seen by everybody who would have come meanwhile. A closed loop hides
it, for its clients wait, too; `closed_loop` is here to find how much a service can do at most. The generator's own lag
is part of the figures, and `Seen.check` refuses those in which it weighs more than a tenth of the P99.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import json
import os
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import httptools
import numpy as np
import numpy.typing as npt
import uvloop

Floats = npt.NDArray[np.float64]
Address = tuple[str, int] | str
"""Host and port, or the path of a unix socket."""

CONNECTIONS = 64
"""Open at the start; more are opened as they are needed."""
PATIENCE_S = 5.0
"""How long the last answers are waited for."""
MAX_LAG = 0.1
"""Largest lag of the generator, as a share of the P99."""


class LagError(Exception):
    """The generator could not keep to its schedule: what it measured is its own delay."""


@dataclass(frozen=True)
class Seen:
    """What became of N requests, in the order in which they were due."""

    due_s: Floats
    """[N], from the start."""
    lag_s: Floats
    """[N], how much later the generator was ready to send it."""
    latency_s: Floats
    """[N], from the moment it was due to the end of its answer; infinite without one."""
    status: npt.NDArray[np.int64]
    """[N], HTTP status; 0: no answer."""

    def quantile_ms(self, share: float) -> float:
        """Latency of the requests that were answered well, by nearest rank; infinite if there is none."""
        good = self.latency_s[self.status == 200]
        return float(np.quantile(good, share, method="inverted_cdf")) * 1e3 if len(good) else float("inf")

    @property
    def lag_p99_ms(self) -> float:
        """P99 of the generator's own lag."""
        return float(np.quantile(self.lag_s, 0.99, method="inverted_cdf")) * 1e3

    @property
    def statuses(self) -> Mapping[int, int]:
        """Requests by status."""
        return dict(Counter(self.status.tolist()))

    def good_rps(self, within_s: float = float("inf")) -> float:
        """Requests/s that were answered with 200 within a time, over the schedule's length."""
        good = (self.status == 200) & (self.latency_s <= within_s)
        return float(good.sum() / max(self.due_s[-1] - self.due_s[0], 1e-9))

    def check(self) -> Seen:
        """Give itself, unless the generator's lag makes it worthless.

        Raises:
            LagError: the P99 of the lag is over a tenth of that of the latencies.
        """
        lag_ms, p99_ms = self.lag_p99_ms, self.quantile_ms(0.99)
        if lag_ms > MAX_LAG * p99_ms:
            raise LagError(f"the generator lagged by {lag_ms:.2f} ms beside a P99 of {p99_ms:.2f} ms (P99 both)")
        return self

    def __str__(self) -> str:
        return (
            f"{len(self.due_s)} requests, P50 {self.quantile_ms(0.5):.2f} ms, P99 {self.quantile_ms(0.99):.2f} ms, "
            f"status {dict(sorted(self.statuses.items()))}, lag P99 {self.lag_p99_ms:.2f} ms"
        )


def poisson(rate_rps: float, seconds: float, seed: int = 0) -> Floats:
    """Draw the moments of independent users: exponential gaps, rising, all under `seconds`."""
    draw = np.random.default_rng(seed)
    moments = np.cumsum(draw.exponential(1 / rate_rps, size=int(rate_rps * seconds * 1.5) + 100))
    return moments[moments < seconds]


def bursts(rate_rps: float, size: int, seconds: float, seed: int = 0) -> Floats:
    """Draw moments at which `size` users come at once, at `rate_rps` requests/s in the mean."""
    return np.repeat(poisson(rate_rps / size, seconds, seed), size)


def get(path: str) -> bytes:
    """Write a whole request without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


def post(path: str, body: Any, headers: Mapping[str, str] | None = None) -> bytes:
    """Write a whole request; `body` is bytes, or made JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Host": "h", "Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode() + data


def open_loop(address: Address, requests: Sequence[bytes], due_s: Floats) -> Seen:
    """Send requests, in turn, at the moments `due_s`.

    Args:
        address: of the service.
        requests: whole HTTP requests; again from the first when they are used up.
        due_s: seconds from the start, rising.
    """
    with _undisturbed():
        return uvloop.run(_Open(address, requests, due_s).run())


def closed_loop(address: Address, requests: Sequence[bytes], clients: int, seconds: float) -> Counter[int]:
    """Let clients send their next request as soon as they have their answer; gives the answers by status."""
    with _undisturbed():
        return uvloop.run(_closed(address, requests, clients, seconds))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the collector's pauses: a run leaves no cycles that matter."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Connection(asyncio.Protocol):
    """One connection, which carries one request at a time."""

    def __init__(self, done: Callable[[_Connection, int], None]) -> None:
        self._done = done
        self._parser: Any = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, request: bytes) -> None:
        """Send one request; `done` hears of its end."""
        assert self._transport is not None
        self._busy = True
        self._transport.write(request)

    @property
    def usable(self) -> bool:
        """Could it carry another request?"""
        return self._transport is not None and not self._transport.is_closing()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_message_complete(self) -> None:
        status, stays = self._parser.get_status_code(), self._parser.should_keep_alive()
        self._busy = False
        if stays:
            self._parser = httptools.HttpResponseParser(self)
        else:
            self.close()
        self._done(self, status)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._busy:
            self._busy = False
            self._done(self, 0)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def _connect(address: Address, done: Callable[[_Connection, int], None]) -> _Connection:
    loop = asyncio.get_running_loop()
    if isinstance(address, str):
        _, connection = await loop.create_unix_connection(lambda: _Connection(done), address)
    else:
        _, connection = await loop.create_connection(lambda: _Connection(done), *address)
    return connection


class _Open:
    """One run of an open loop."""

    def __init__(self, address: Address, requests: Sequence[bytes], due_s: Floats) -> None:
        self._address, self._requests, self._due = address, requests, due_s.tolist()
        size = len(due_s)
        self._lag, self._latency, self._status = [0.0] * size, [float("inf")] * size, [0] * size
        self._next = 0
        self._left = size
        self._idle: list[_Connection] = []
        self._waiting: deque[int] = deque()
        self._carries: dict[_Connection, int] = {}
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self) -> Seen:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        for _ in range(min(CONNECTIONS, len(self._due))):
            self._idle.append(await _connect(self._address, self._done))
        with _Alarm() as alarm:
            self._alarm, self._began = alarm, time.monotonic() + 0.01
            self._loop.add_reader(alarm.fd, self._send_due)
            alarm.set(self._began + self._due[0])
            with suppress(TimeoutError):  # who got no answer has status 0
                await asyncio.wait_for(self._ended.wait(), self._due[-1] + PATIENCE_S)
            self._loop.remove_reader(alarm.fd)
        for connection in (*self._idle, *self._carries):
            connection.close()
        due_s, lag_s, latency_s = (np.array(values) for values in (self._due, self._lag, self._latency))
        return Seen(due_s, lag_s, latency_s, np.array(self._status))

    def _send_due(self) -> None:
        """Send all that is due, then set the alarm for the next."""
        self._alarm.clear()
        while self._next < len(self._due):
            late = time.monotonic() - self._began - self._due[self._next]
            if late < 0:
                self._alarm.set(self._began + self._due[self._next])
                return
            self._lag[self._next] = late
            self._send(self._next)
            self._next += 1

    def _send(self, index: int) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._carries[connection] = index
                connection.send(self._requests[index % len(self._requests)])
                return
        self._waiting.append(index)
        task = asyncio.create_task(self._open_another())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open_another(self) -> None:
        try:
            self._free(await _connect(self._address, self._done))
        except OSError:
            if self._waiting:
                self._settle(self._waiting.popleft(), 0)

    def _free(self, connection: _Connection) -> None:
        self._idle.append(connection)
        if self._waiting and connection.usable:
            self._send(self._waiting.popleft())

    def _done(self, connection: _Connection, status: int) -> None:
        self._settle(self._carries.pop(connection), status)
        if connection.usable:
            self._free(connection)

    def _settle(self, index: int, status: int) -> None:
        if status:
            self._latency[index] = time.monotonic() - self._began - self._due[index]
        self._status[index] = status
        self._left -= 1
        if not self._left:
            self._ended.set()


async def _closed(address: Address, requests: Sequence[bytes], clients: int, seconds: float) -> Counter[int]:
    statuses: Counter[int] = Counter()
    supply = itertools.cycle(requests)
    end = time.monotonic() + seconds
    left, ended = clients, asyncio.Event()

    def done(connection: _Connection, status: int) -> None:
        nonlocal left
        statuses[status] += 1
        if time.monotonic() < end and connection.usable:
            connection.send(next(supply))
            return
        connection.close()
        left -= 1
        if not left:
            ended.set()

    connections = [await _connect(address, done) for _ in range(clients)]
    for connection in connections:
        connection.send(next(supply))
    await asyncio.wait_for(ended.wait(), seconds + PATIENCE_S)
    return statuses


class _Alarm:
    """A timer of the kernel's that a loop can wait for: the loop's own keep to whole milliseconds."""

    MONOTONIC, NONBLOCK, ABSOLUTE = 1, os.O_NONBLOCK, 1

    def __enter__(self) -> _Alarm:
        self._libc = ctypes.CDLL(None, use_errno=True)  # Python has it from 3.13 on
        self.fd = self._libc.timerfd_create(self.MONOTONIC, self.NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def set(self, moment: float) -> None:
        """Ring at a moment of `time.monotonic`; at once if it is over."""
        seconds, rest = divmod(max(moment, 1e-6), 1)
        self._libc.timerfd_settime(self.fd, self.ABSOLUTE, struct.pack("qqqq", 0, 0, int(seconds), int(rest * 1e9)), 0)

    def clear(self) -> None:
        """Take note of a ring."""
        os.read(self.fd, 8)
