"""Redis as a replica uses it: by a unix socket, and never for long, for answers wait for it."""

from __future__ import annotations

import time
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from slipway.errors import TransientError

TIMEOUT_S: Final = 0.02
REST_S: Final = 1.0
"""Time without a try after a failure."""
CONNECTIONS: Final = 16
KEEP: Final = "for i, key in ipairs(KEYS) do redis.call('SET', key, ARGV[i + 1], 'EX', ARGV[1]) end"
"""Writes many values, which live ARGV[1] seconds, by one command: a pipeline of SETs cost a request four times as much
in the client."""


def connect(socket: str, connections: int = CONNECTIONS, timeout_s: float = TIMEOUT_S) -> Redis:
    """Make a client whose calls fail within `timeout_s`."""
    pool = BlockingConnectionPool(
        max_connections=connections,
        timeout=timeout_s,
        connection_class=UnixDomainSocketConnection,
        path=socket,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),  # as it comes, redis-py tries for seconds
    )
    return Redis.from_pool(pool)


class Resting:
    """A Redis that is left alone for a second after a failure; made and used on the event loop.

    Args:
        socket: path of its unix socket.
        problem: what cannot be done without it, such as "feedback cannot be taken now".
        timeout_s: longest time of a call.
    """

    def __init__(self, socket: str, problem: str, timeout_s: float = TIMEOUT_S) -> None:
        self.client = connect(socket, timeout_s=timeout_s)
        self._problem = f"{problem}: Redis is away; try again later"
        self._rest_until = 0.0

    @property
    def rests(self) -> bool:
        """Whether it failed a moment ago."""
        return time.monotonic() < self._rest_until

    async def ask(self, call: Any) -> Any:
        """Await a call of the client, or do not begin it.

        Raises:
            TransientError: Redis is away.
        """
        if self.rests:
            call.close()
            raise TransientError(self._problem)
        try:
            return await call
        except (RedisError, OSError) as error:
            self._rest_until = time.monotonic() + REST_S
            raise TransientError(self._problem) from error

    async def close(self) -> None:
        """End its connections."""
        await self.client.aclose()
