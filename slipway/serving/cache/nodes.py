"""The levels outside the process: one or more plain Redis servers, each reached by a unix socket.

A key belongs to the node that scores highest for it (rendezvous hashing, Thaler and Ravishankar 1998): losing one of N
loses 1/N of the keys and moves no other. What requests of one turn of the loop look up goes to a node in one MGET.

A node has 20 ms. One that is late, away or speaks rubbish is left alone until it answers a PING in the background: only
the requests that met its failure pay for it, and with the first failed call all look-ups that wait for it are misses.
Writing goes by a bounded queue and never slows an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

from slipway.serving.redis import KEEP, TIMEOUT_S, connect

PROBE_S: Final = 0.5
CONNECTIONS: Final = 4
MAX_QUEUED: Final = 4096
MAX_AT_ONCE: Final = 64
PREFIX: Final = b"slipway:cache:"


class Observer(Protocol):
    """Who wants to know how it goes."""

    def failed(self, level: str) -> None:
        """A call of a node failed."""

    def opened(self, level: str, change: int) -> None:
        """So many nodes more are left alone."""

    def dropped(self, level: str) -> None:
        """A value was not written."""


class Node:
    """One Redis server; made and used on the event loop."""

    def __init__(self, socket: str, level: str, ttl_s: int, observer: Observer) -> None:
        self._level, self._ttl_s, self._observer = level, ttl_s, observer
        self._redis: Any = connect(socket, CONNECTIONS)
        self._keep = self._redis.register_script(KEEP)
        self._wanted: dict[bytes, asyncio.Future[object]] = {}
        self._asked: set[asyncio.Future[object]] = set()
        self._queue: deque[tuple[bytes, bytes]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = self._open = False

    async def get(self, key: bytes) -> object:
        """Look one up; None: it is not there, or the node is not well."""
        if self._open:
            return None
        if not self._wanted:
            asyncio.get_running_loop().call_soon(lambda: self._start(self._get_all()))
        future = self._wanted.get(key)
        if future is None:
            future = self._wanted[key] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(future)

    def put(self, key: bytes, value: bytes) -> None:
        """Write soon, or never."""
        if self._open or len(self._queue) >= MAX_QUEUED:
            self._observer.dropped(self._level)
            return
        self._queue.append((PREFIX + key, value))
        if not self._writing:
            self._writing = True
            self._start(self._write())

    async def close(self) -> None:
        """End; what is not written yet is not kept."""
        for task in list(self._tasks):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self._redis.aclose()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _get_all(self) -> None:
        wanted, self._wanted = self._wanted, {}
        self._asked.update(wanted.values())
        values: Sequence[object] = ()
        try:
            found = await self._call(self._redis.mget([PREFIX + key for key in wanted]))
            if isinstance(found, list) and len(found) == len(wanted):
                values = found
            elif found is not None:
                self._fail()
        finally:
            self._asked.difference_update(wanted.values())
            for future, value in zip(wanted.values(), values or [None] * len(wanted), strict=True):
                if not future.done():
                    future.set_result(value)

    async def _write(self) -> None:
        try:
            while self._queue and not self._open:
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_AT_ONCE))]
                keys, values = zip(*batch, strict=True)
                await self._call(self._keep(keys, [self._ttl_s, *values]))
        finally:
            self._writing = False
            self._queue.clear()

    async def _call(self, work: Any) -> Any:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await work
        except Exception:  # noqa: BLE001  # a peer that speaks rubbish raises anything; all of it is a miss
            self._fail()
            return None

    def _fail(self) -> None:
        self._observer.failed(self._level)
        if not self._open:
            self._open = True
            for future in self._asked:
                if not future.done():
                    future.set_result(None)
            self._observer.opened(self._level, 1)
            self._start(self._probe())

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            with suppress(Exception):  # as in a call
                async with asyncio.timeout(TIMEOUT_S):
                    if await self._redis.ping():
                        break
        self._open = False
        self._observer.opened(self._level, -1)


class Nodes:
    """One level: nodes that share the keys."""

    def __init__(self, level: str, sockets: Sequence[str], ttl_s: int, observer: Observer) -> None:
        self.level = level
        self._nodes = {socket.encode()[-64:]: Node(socket, level, ttl_s, observer) for socket in sockets}

    async def get(self, key: bytes) -> object:
        """Look one up at its node."""
        return await self._nodes[owner(key, tuple(self._nodes))].get(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Write one to its node, soon."""
        self._nodes[owner(key, tuple(self._nodes))].put(key, value)

    async def close(self) -> None:
        """End."""
        for node in self._nodes.values():
            await node.close()


def owner(key: bytes, names: Sequence[bytes]) -> bytes:
    """Say which node a key belongs to: the one that scores highest for it.

    Args:
        key: of an entry.
        names: of the nodes, at most 64 bytes each.
    """
    if len(names) == 1:
        return names[0]
    return max(names, key=lambda name: hashlib.blake2b(key, key=name, digest_size=8).digest())
