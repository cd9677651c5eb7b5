"""What was shown to whom, until the feedback comes: kept in Redis for an hour, so that any replica can look it up.

Keeping must never slow an answer: it only appends to a bounded queue, which one background task writes out,
many at once. No answer waits for Redis here, so it has more patience with it than others: on a busy machine 20 ms lost
a tenth of the feedback and more. When Redis is away, for a second after a failure no call is tried.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from slipway.errors import TransientError
from slipway.serving.redis import KEEP, Resting

LIFETIME_S: Final = 3600
PATIENCE_S: Final = 0.2
"""Longest time of a call: less than the gateway gives a replica, so that feedback itself is told of a stalled Redis."""
MAX_QUEUED: Final = 10_000
MAX_AT_ONCE: Final = 256
USED: Final = b"used"
"""Stands in the place of what was shown once the feedback on it came."""


class Shown(msgspec.Struct):
    """What one answer showed."""

    version: str
    items: Sequence[str]


class Memory:
    """The answers that wait for feedback; made and used on the event loop.

    Args:
        socket: path of Redis' unix socket.
        forgot: called with the number of answers that could not be kept.
    """

    def __init__(self, socket: str, forgot: Callable[[int], None]) -> None:
        self._forgot = forgot
        self._redis = Resting(socket, "feedback cannot be taken now", PATIENCE_S)
        self._keep_all = self._redis.client.register_script(KEEP)
        self._queue: deque[tuple[str, Shown]] = deque()
        self._wake = asyncio.Event()
        self._writer = asyncio.create_task(self._write_all())
        self._encoder, self._decoder = msgspec.json.Encoder(), msgspec.json.Decoder(Shown)

    def keep(self, request_id: str, shown: Shown) -> None:
        """Remember an answer soon; drop it when too many wait."""
        if len(self._queue) >= MAX_QUEUED:
            self._forgot(1)
            return
        self._queue.append((request_id, shown))
        self._wake.set()

    async def use(self, request_id: str) -> Shown | bool:
        """Take what a request showed, once.

        Returns: what was shown; True if the feedback came before; False if nothing is known of the request.

        Raises:
            TransientError: Redis is away.
        """
        call = self._redis.client.set(_key(request_id), USED, xx=True, get=True, keepttl=True)
        found = await self._redis.ask(call)
        if found is None:
            return False
        return found == USED or self._decoder.decode(found)

    async def close(self) -> None:
        """Write what waits, then end."""
        if self._queue:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._write(), 1.0)
        self._writer.cancel()
        with suppress(asyncio.CancelledError):
            await self._writer
        await self._redis.close()

    async def _write_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._write()

    async def _write(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_AT_ONCE))]
            keys = [_key(request_id) for request_id, _ in batch]
            values = [self._encoder.encode(shown) for _, shown in batch]
            try:
                await self._redis.ask(self._keep_all(keys, [LIFETIME_S, *values]))
            except TransientError:
                self._forgot(len(batch))


def _key(request_id: str) -> str:
    return f"slipway:shown:{request_id}"
