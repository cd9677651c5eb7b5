"""The least that a request costs on this machine in Python: `python -m benchmarks.serving.bare PORT`.

HTTP by httptools on uvloop's sockets and JSON by msgspec, as in a replica, and nothing else: the body is decoded, an
answer of the replica's size encoded. There is no queue, no engine, no deadline, no limit, no metric.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import httptools
import msgspec
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nx-slipway-version: 1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
ITEMS = [{"item": f"item{n}", "score": 0.123456789 * n} for n in range(1000, 1010)]
ANSWER = {"request_id": "0123456789abcdef01234567", "model": "ranker", "version": "1", "items": ITEMS, "ignored": []}


class Asked(msgspec.Struct):
    """What the benchmark's clients ask."""

    history: list[str]
    k: int


_decode, _encode = msgspec.json.Decoder(Asked).decode, msgspec.json.Encoder().encode


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """A request, as the benchmark sends them: whole."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Answer it."""
        assert _decode(body).history
        answer = _encode(ANSWER)
        self._transport.write(HEAD % (len(answer), answer))


async def serve(port: int) -> None:
    """Answer until killed."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
