"""HTTP/1.1 on asyncio and httptools: connections in, `Request` to one coroutine, `Response` back out.

Why no framework: a bare ASGI callable on uvicorn cost a request about 50 µs more of the processor, and uvicorn bounds
neither the headers nor the time that a slow client may take. Every bound stands here: of head, body, time, and
requests in line.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import math
from collections import deque
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, NamedTuple, cast

import httptools

from slipway.errors import StackError

HOST: Final = "127.0.0.1"
MAX_HEAD_BYTES: Final = 32_768
MAX_IN_LINE: Final = 32
"""Pipelined requests of one connection before its socket is no longer read."""
REQUEST_S: Final = 30.0
"""Longest time from a request's first byte to its last, and that a client may take to read its answer."""
IDLE_S: Final = 75.0
"""A connection without a request is closed then: later than nginx (60 s), so that nginx never meets a closing one."""
LINGER_S: Final = 1.0
"""After a refusal the rest of the request is read away, or the client would see a reset and not the answer."""

_HEAD_TOO_LARGE: Final = (431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")


class Request(NamedTuple):
    """One whole request."""

    method: str
    path: str
    body: bytes


class Response(NamedTuple):
    """One answer."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: str = ""
    """Further header lines, each ended by CR LF."""


Answer = Callable[[Request], Awaitable[Response]]
Refuse = Callable[[int, str], Response]


@functools.lru_cache(maxsize=256)
def _head(status: int, content_type: str, headers: str) -> bytes:
    phrase = HTTPStatus(status).phrase
    return f"HTTP/1.1 {status} {phrase}\r\n{headers}Content-Type: {content_type}\r\nContent-Length: ".encode()


class HttpServer:
    """The listening socket and its connections.

    Args:
        answer: makes the response to a request; it must not raise.
        refuse: makes the response to what never became a request, from a status and a message.
        max_body_bytes: largest body.
    """

    def __init__(self, answer: Answer, refuse: Refuse, max_body_bytes: int) -> None:
        self.answer, self.refuse, self.max_body_bytes = answer, refuse, max_body_bytes
        self.connections: set[Connection] = set()
        self.draining = False
        self.date = b""
        self._listener: asyncio.Server | None = None
        self._clock: asyncio.TimerHandle | None = None

    async def listen(self, port: int) -> None:
        """Accept connections on a port of the loopback interface.

        Raises:
            StackError: the port is taken.
        """
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(lambda: Connection(self, loop), HOST, port, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise StackError(f"port {port}: in use by another program; give another --port") from error
        self._tick(loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Once a second: the date of the answers, and an end to connections that took too long."""
        self.date = f"\r\nDate: {formatdate(usegmt=True)}\r\n".encode()
        now = loop.time()
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.expire()
        self._clock = loop.call_later(1.0, self._tick, loop)

    async def drain(self, accept_s: float, timeout_s: float) -> None:
        """Go on accepting for `accept_s`, then finish what was begun, for `timeout_s` at most, and close everything."""
        self.draining = True
        await asyncio.sleep(accept_s)
        if self._listener is not None:
            self._listener.close()
        end = asyncio.get_running_loop().time() + timeout_s
        await asyncio.sleep(accept_s)  # who was accepted last has not sent its request yet
        while any(c.busy for c in self.connections) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.close()
        if self._clock is not None:
            self._clock.cancel()
        await asyncio.sleep(0)


class Connection(asyncio.Protocol):
    """One client: its requests are answered one after another, in order."""

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self._loop = server, loop
        self._parser = httptools.HttpRequestParser(self)
        self._line: deque[tuple[Request, bool]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport
        self._reading = self._stalled = self._refused = self._upgrade = False
        self._refusal: tuple[int, str] | None = None
        self._in_head = True
        self._head_bytes = self._body_bytes = 0
        self._target = b""
        self._expects = False
        self._body: list[bytes] = []
        self.deadline = loop.time() + IDLE_S

    @property
    def busy(self) -> bool:
        """A request is being read, answered, or its answer is being sent."""
        return self._task is not None or self._reading or bool(self._line) or self._stalled

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Withdraw what the client no longer waits for."""
        self._server.connections.discard(self)
        self._line.clear()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse; requests that become whole start from `on_message_complete`."""
        if self._refused:
            return
        in_head = self._in_head and self._reading
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._upgrade = True  # the request itself was parsed: it is answered in HTTP/1.1, then the connection ends
            self._transport.pause_reading()
        except httptools.HttpParserError:
            self._refusal = self._refusal or (400, "this is not HTTP/1.1")
        if in_head and self._in_head:  # the parser tells of whole headers only: count what it keeps to itself
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refusal = _HEAD_TOO_LARGE
        if self._refusal is not None and not self._line and self._task is None:
            self._refuse(*self._refusal)

    def pause_writing(self) -> None:
        """The client does not read its answers: give it a while, and start nothing new for it."""
        self._stalled = True
        self.deadline = self._loop.time() + REQUEST_S

    def resume_writing(self) -> None:
        """The client caught up."""
        self._stalled = False
        self._next()

    # What httptools calls

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._reading, self._in_head, self._expects = True, True, False
        self._head_bytes = self._body_bytes = 0
        self._target, self._body = b"", []
        if self._task is None:
            self.deadline = self._loop.time() + REQUEST_S

    def on_url(self, url: bytes) -> None:
        """The target, maybe in pieces."""
        self._target += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Two headers matter here; framing is the parser's."""
        self._head_bytes += len(name) + len(value)
        lower = name.lower()
        if lower == b"content-length" and int(value) > self._server.max_body_bytes:
            self._too_large()
        elif lower == b"expect" and value.lower() == b"100-continue":
            self._expects = True

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = _HEAD_TOO_LARGE
        elif self._expects and self._refusal is None and self._task is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        if self._body_bytes > self._server.max_body_bytes:
            self._too_large()
        elif self._refusal is None:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole: put it in line."""
        self._reading, self._in_head = False, True
        if self._refusal is not None:
            return
        path = self._target.partition(b"?")[0].decode("latin-1")
        request = Request(self._parser.get_method().decode("ascii"), path, b"".join(self._body))
        self._line.append((request, self._parser.should_keep_alive()))
        if len(self._line) > MAX_IN_LINE:
            self._transport.pause_reading()
        self._next()

    # What comes of it

    def _too_large(self) -> None:
        self._refusal = (413, f"the body is larger than {self._server.max_body_bytes} bytes")

    def _next(self) -> None:
        if self._task is not None or self._stalled:
            return
        if self._line:
            self.deadline = math.inf
            self._task = self._loop.create_task(self._serve(*self._line.popleft()))
        elif self._refusal is not None:
            self._refuse(*self._refusal)
        else:
            self.deadline = self._loop.time() + (REQUEST_S if self._reading else IDLE_S)

    async def _serve(self, request: Request, keep_alive: bool) -> None:
        response = await self._server.answer(request)
        self._task = None
        if self._transport.is_closing():
            return
        last_now = self._server.draining and not self._line and not self._reading
        keep_alive = keep_alive and not last_now and not self._upgrade
        self._write(response, keep_alive, request.method != "HEAD")
        if not keep_alive:
            self._transport.close()
        else:
            if len(self._line) == MAX_IN_LINE:
                self._transport.resume_reading()
            self._next()

    def _write(self, response: Response, keep_alive: bool, with_body: bool) -> None:
        head = _head(response.status, response.content_type, response.headers)
        end = b"\r\n" if keep_alive else b"Connection: close\r\n\r\n"
        body = response.body if with_body else b""
        self._transport.write(b"".join((head, b"%d" % len(response.body), self._server.date, end, body)))

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no request, and read the rest away."""
        self._refused, self._reading, self._refusal = True, False, None
        self._write(self._server.refuse(status, message), keep_alive=False, with_body=True)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._loop.call_later(LINGER_S, self._transport.close)

    def expire(self) -> None:
        """The deadline passed: say so where a request was begun, else just close."""
        self.deadline = math.inf
        if self._stalled:
            self._transport.abort()
        elif self._reading and not self._refused:
            self._refuse(408, f"the request was not whole after {REQUEST_S:.0f} s")
        else:
            self._transport.close()

    def close(self) -> None:
        """End the connection; what was written is still sent."""
        if self._task is not None:
            self._task.cancel()
        self._transport.close()
