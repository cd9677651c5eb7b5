"""Reading requests: what may take long is read beside the event loop, which answers others meanwhile.

A picture of 16 million pixels takes half a second and can be a file of 700 bytes; a text of a megabyte takes one.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from slipway.errors import OverloadError
from slipway.workloads.base import Endpoint, Query

QUICK_BYTES = 8192
"""A body up to this is read at once, unless the endpoint knows better: a change of threads would cost more."""
THREADS = 2


class Reader:
    """Reads the bodies of requests to the workload's own endpoint; made and used on the event loop.

    Args:
        endpoint: knows how.
        max_waiting: most bodies that are being read or wait for it.
    """

    def __init__(self, endpoint: Endpoint, max_waiting: int) -> None:
        self._endpoint, self._max_waiting = endpoint, max_waiting
        self._waiting = 0
        self._pool = ThreadPoolExecutor(THREADS, "reader")  # its threads start with the first body that needs one

    def quick(self, body: bytes) -> bool:
        """Is a body decoded at once, or in a thread?"""
        return len(body) <= QUICK_BYTES and not self._endpoint.slow

    async def read(self, body: bytes) -> Query:
        """Decode one body.

        Raises:
            RequestError: says which field is wrong and what is allowed.
            OverloadError: too many wait.
        """
        if self.quick(body):
            return self._endpoint.decode(body)
        if self._waiting >= self._max_waiting:
            raise OverloadError(f"{self._max_waiting} requests are being read already; try again later")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._endpoint.decode, body)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Read no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
