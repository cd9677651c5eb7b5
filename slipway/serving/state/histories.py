"""What each user did last, in Redis, so that any replica can answer from it: a sorted set a user, by time.

Its members bear the events' ids, so that one that comes twice is there once, and events that were held up while Redis
was away fall into their place. A script writes many events at once: each is added, its user's set cut to the newest,
in one step that nobody sees the middle of. When Redis is away calls fail within 20 ms, and for a second after a failure
none is tried; events wait here meanwhile. They are in the journal already: should this replica die too, the log has
them and the history lacks them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from slipway.errors import TransientError
from slipway.eventlog import WINDOW_S, Event
from slipway.serving.redis import REST_S, Resting

KEPT_S: Final = 90 * 86_400
"""Who did nothing for so long is a newcomer again."""
MAX_QUEUED: Final = 100_000
MAX_AT_ONCE: Final = 256
# KEYS: history and mark of each event's user; ARGV: cap, lifetime, then member, time and arrival of each event.
APPEND: Final = """
for i = 1, #KEYS / 2 do
    local key, at = KEYS[2 * i - 1], ARGV[3 * i + 2]
    local gone = redis.call('GET', KEYS[2 * i])
    if not gone or tonumber(gone) < tonumber(at) then
        redis.call('ZADD', key, 'NX', ARGV[3 * i + 1], ARGV[3 * i])
        redis.call('ZREMRANGEBYRANK', key, 0, -ARGV[1] - 1)
        redis.call('EXPIRE', key, ARGV[2])
    end
end"""
READ: Final = """
local found = {}
for i, key in ipairs(KEYS) do found[i] = '[' .. table.concat(redis.call('ZRANGE', key, 0, -1), ',') .. ']' end
return found"""
"""Gives JSON: as strings of their own, redis-py would take longer to part the members than the model to run."""
FORGET: Final = """
local count = redis.call('ZCARD', KEYS[1])
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
return count"""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[tuple[str, str]]).decode


class Histories:
    """The histories of all users; made and used on the event loop.

    Args:
        socket: path of Redis' unix socket.
        cap: newest events that are kept of a user.
        forgot: called with the number of events that no history will have.
    """

    def __init__(self, socket: str, cap: int, forgot: Callable[[int], None]) -> None:
        self._cap, self._forgot = cap, forgot
        self._redis = Resting(socket, "histories cannot be reached now")
        self._append, self._forget, self._read_all = map(self._redis.client.register_script, (APPEND, FORGET, READ))
        self._reads: list[tuple[str, asyncio.Future[bytes]]] = []
        self._reading: set[asyncio.Task[None]] = set()
        self._queue: deque[tuple[Event, asyncio.Future[None] | None]] = deque()
        self._wake = asyncio.Event()
        self._writer = asyncio.create_task(self._write_all())

    def __len__(self) -> int:
        """Events that wait for Redis."""
        return len(self._queue)

    async def append(self, events: Sequence[Event]) -> None:
        """Add events to their users' histories: now, or when Redis is back, in which case this returns at once."""
        room = max(0, MAX_QUEUED - len(self._queue))
        if room < len(events):
            self._forgot(len(events) - room)
        if not (taken := events[:room]):
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.extend((event, None) for event in taken[:-1])
        self._queue.append((taken[-1], done))
        self._wake.set()
        if not self._redis.rests:
            await done

    async def of(self, user: str) -> list[str]:
        """Give a user's items, oldest first; none of somebody who is new.

        Raises:
            TransientError: Redis is away.
        """
        loop = asyncio.get_running_loop()
        if not self._reads:
            loop.call_soon(self._begin_reads)
        found: asyncio.Future[bytes] = loop.create_future()
        self._reads.append((user, found))
        return [item for _, item in _decode(await found)]

    def _begin_reads(self) -> None:
        """Read what was asked for in one turn of the loop by one command: one a user costs much more."""
        reads, self._reads = self._reads, []
        task = asyncio.create_task(self._read(reads))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _read(self, reads: Sequence[tuple[str, asyncio.Future[bytes]]]) -> None:
        try:
            all_found = await self._redis.ask(self._read_all([_key(user) for user, _ in reads]))
            for (_, waiting), found in zip(reads, all_found, strict=True):
                if not waiting.done():
                    waiting.set_result(found)
        except TransientError as error:
            for _, waiting in reads:
                if not waiting.done():
                    waiting.set_exception(error)
        finally:
            for _, waiting in reads:
                waiting.cancel()  # does nothing to what is done

    async def forget(self, user: str) -> int:
        """Remove a user, and refuse what of him is still under way; give the number of events that were kept.

        Raises:
            TransientError: Redis is away.
        """
        now = time.time_ns() // 1000
        return int(await self._redis.ask(self._forget([_key(user), _mark(user)], [now, WINDOW_S])))

    async def close(self) -> None:
        """Write what waits, then end."""
        self._writer.cancel()
        with suppress(asyncio.CancelledError):
            await self._writer
        with suppress(TimeoutError, TransientError):
            await asyncio.wait_for(self._write(), 1.0)
        await self._redis.close()

    async def _write_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._write()
            except TransientError:
                self._let_go()
                await asyncio.sleep(REST_S)
                self._wake.set()

    def _let_go(self) -> None:
        """Nobody waits for an event while Redis is away."""
        for _, done in self._queue:
            if done is not None and not done.done():
                done.set_result(None)

    async def _write(self) -> None:
        while self._queue:
            batch = [self._queue[i] for i in range(min(len(self._queue), MAX_AT_ONCE))]
            keys: list[str] = []
            values: list[int | bytes] = [self._cap, KEPT_S]
            for event, _ in batch:
                keys += (_key(event.user), _mark(event.user))
                values += (_encode((event.id, event.item)), event.time, event.at)
            await self._redis.ask(self._append(keys, values))
            for _ in batch:  # only now: a failure leaves them where they are
                _, done = self._queue.popleft()
                if done is not None and not done.done():
                    done.set_result(None)


def _key(user: str) -> str:
    return f"slipway:history:{user}"


def _mark(user: str) -> str:
    return f"slipway:forgotten:{hashlib.sha256(user.encode()).hexdigest()}"
