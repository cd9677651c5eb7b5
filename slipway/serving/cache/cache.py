"""The three levels together, one flight for equal questions, and old answers where there is no other."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from slipway.errors import DeadlineError, OverloadError, RequestError
from slipway.params import CacheParams
from slipway.serving.cache import nodes
from slipway.serving.cache.entry import MAX_BYTES, Entry, key_of, seal, unseal
from slipway.serving.cache.memory import Memory
from slipway.serving.cache.nodes import Nodes
from slipway.serving.redis import TIMEOUT_S
from slipway.workloads.base import Query

MEMORY, NONE, STALE = "memory", "none", "stale"
LEVELS = (MEMORY, "redis", "distributed")
JITTER = 0.1
"""What was kept at once does not age at once: lifetimes differ by this share."""

Ask = Callable[[], Awaitable[Entry]]
Answer = tuple[Entry, str]


class Observer(nodes.Observer, Protocol):
    """Who wants to know how it goes."""

    def looked(self, level: str, seconds: float) -> None:
        """A look-up in a level took so long, whatever it found."""

    def found(self, level: str) -> None:
        """An answer came from a level, or from none."""

    def coalesced(self) -> None:
        """A request got the answer of an equal one that was under way."""


class _Flight:
    __slots__ = ("deadline", "task", "waiting")

    def __init__(self, task: asyncio.Task[Answer], deadline: float) -> None:
        self.task, self.deadline, self.waiting = task, deadline, 0


class Cache:
    """Made and used on the event loop.

    Args:
        params: sizes and times.
        model: what tells this model's answers from any other's: workload, version, package.
        near: socket of the Redis near the replica, if there is one.
        shared: sockets of the nodes that all replicas share.
        observer: is told of all.
    """

    def __init__(
        self, params: CacheParams, model: str, near: str | None, shared: Sequence[str], observer: Observer
    ) -> None:
        self._params, self._observer = params, observer
        self._prefix = f"{model}\0".encode()
        self.memory = Memory(params.memory_mb * 1_000_000)
        ttl_s = max(1, int(params.ttl_s * (1 + JITTER) + params.stale_s))
        levels = zip(LEVELS[1:], ([near] if near else [], shared), strict=True)
        self._outer = [Nodes(level, sockets, ttl_s, observer) for level, sockets in levels if sockets]
        self._flights: dict[bytes, _Flight] = {}

    async def get(self, query: Query, ask: Ask, deadline: float, fresh: bool = False) -> Answer:
        """Give an answer and where it came from: a level, `none` for the engine, or `stale`.

        Args:
            query: what is asked.
            ask: asks the engine, whose errors are raised unless an old answer is at hand.
            deadline: moment by which the answer is wanted.
            fresh: ask the engine whatever is kept (`Cache-Control: no-cache`).
        """
        try:
            key = key_of(self._prefix, query)
        except (TypeError, msgspec.MsgspecError):  # asks what has no one name: it is not kept
            return await ask(), NONE
        if fresh:
            return self._keep(key, await ask()), NONE
        began = time.perf_counter()
        entry = self.memory.get(key)
        self._observer.looked(MEMORY, time.perf_counter() - began)
        if entry is not None and entry.fresh_until > time.time():
            self._observer.found(MEMORY)
            return entry, MEMORY
        answer = await self._together(key, entry, ask, deadline)
        self._observer.found(answer[1])
        return answer

    async def close(self) -> None:
        """End the connections."""
        for level in self._outer:
            await level.close()

    async def _together(self, key: bytes, old: Entry | None, ask: Ask, deadline: float, again: bool = True) -> Answer:
        """Share one flight among equal questions. It is nobody's own: whoever leaves, the others get their answer."""
        flight = self._flights.get(key)
        if flight is None or flight.deadline > deadline:
            flight = _Flight(asyncio.ensure_future(self._look(key, old, ask)), deadline)
            self._flights[key] = flight
            return await self._wait(key, flight)
        if again:
            self._observer.coalesced()
        try:
            return await self._wait(key, flight)
        except (DeadlineError, OverloadError):  # the first one was in a greater hurry: the others share a second flight
            if not again:
                raise
            return await self._together(key, old, ask, deadline, again=False)

    async def _wait(self, key: bytes, flight: _Flight) -> Answer:
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting:  # all have it, or all have hung up
                flight.task.cancel()
            if (flight.task.done() or not flight.waiting) and self._flights.get(key) is flight:
                del self._flights[key]

    async def _look(self, key: bytes, old: Entry | None, ask: Ask) -> Answer:
        if self._outer:
            entry, level = await self._outside(key)
            if entry is not None and entry.fresh_until > time.time():
                return entry, level
            old = old or entry
        try:
            return self._keep(key, await ask()), NONE
        except RequestError:
            raise
        except Exception:
            if old is None or old.fresh_until + self._params.stale_s < time.time():
                raise
            return old, STALE

    async def _outside(self, key: bytes) -> tuple[Entry | None, str]:
        """Look in the levels outside of the process, which have 20 ms together, for their time is a user's."""
        old: Entry | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT_S):
                for at, nodes in enumerate(self._outer):
                    began = time.perf_counter()
                    try:
                        entry = unseal(key, await nodes.get(key))
                    finally:
                        self._observer.looked(nodes.level, time.perf_counter() - began)
                    if entry is not None and entry.fresh_until > time.time():
                        self.memory.put(key, entry)
                        self._write(key, entry, self._outer[:at])
                        return entry, nodes.level
                    old = old or entry
        return old, NONE

    def _keep(self, key: bytes, entry: Entry) -> Entry:
        if len(entry.body) > MAX_BYTES:
            return entry
        lifetime_s = self._params.ttl_s * random.uniform(1 - JITTER, 1 + JITTER)
        entry = msgspec.structs.replace(entry, fresh_until=time.time() + lifetime_s)
        self.memory.put(key, entry)
        self._write(key, entry, self._outer)
        return entry

    def _write(self, key: bytes, entry: Entry, levels: Sequence[Nodes]) -> None:
        value = seal(key, entry) if levels else None
        if value is not None:
            for level in levels:
                level.put(key, value)
