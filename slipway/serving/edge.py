"""The edge: HTTP/1.1 on sockets, whole requests in, whole answers out.

A protocol of our own on httptools' parser, because a request costs 48 µs less here than behind uvicorn, of 256, the
engine's share included (docs/decisions/0004-http-of-our-own.md).

A connection answers one request at a time, in the order in which they came. Who hangs up withdraws its request. Bodies
and heads have a limit, and so has the time in which a request must be whole and an answer taken.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import unquote_to_bytes

import httptools
import msgspec

Headers = Mapping[bytes, bytes]
"""By name, in lower case; the first of several of one name."""

BACKLOG = 1024
MAX_HEAD_BYTES = 65_536
MAX_PIPELINED = 16
"""Requests of one connection that wait behind the one that is answered; then it is not read on."""
IDLE_S = 15
"""An idle connection is closed then, as one with half a request, or whose client takes no answer. nginx closes its own
earlier, so that it never sends into a closing one."""
STOPPED = "this replica was stopped before it could answer; try again"


class Request(msgspec.Struct, frozen=True, gc=False):
    """One whole request."""

    method: str
    path: str
    body: bytes
    query: bytes = b""
    """What stands behind the question mark, as it came."""
    headers: Headers = MappingProxyType({})

    def header(self, name: bytes) -> bytes | None:
        """Give a header's first value; `name` in lower case."""
        return self.headers.get(name)


class Response(msgspec.Struct, frozen=True, gc=False):
    """One answer; the length is told by the edge."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


class Pending(Protocol):
    """An answer that is under way."""

    def cancel(self) -> object:
        """Give it up: it is not wanted any more."""


Reply = Callable[[Response], None]
Answer = Callable[[Request, Reply], Response | Pending]
"""Gives the response at once; or what is under way, which calls the reply, later and once, unless it is cancelled."""


def in_tasks(answer: Callable[[Request], Awaitable[Response]], refuse: Callable[[int, str], Response]) -> Answer:
    """Let a coroutine answer, in a task of its own; `refuse` as of `Edge`."""

    async def run(request: Request, reply: Reply) -> None:
        try:
            response = await answer(request)
        except asyncio.CancelledError:
            if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                raise
            response = refuse(503, STOPPED)  # not this task was, but one that it waits for
        reply(response)

    return lambda request, reply: asyncio.get_running_loop().create_task(run(request, reply))


class _Turn(NamedTuple):
    """What a connection has to answer next."""

    ask: Request | Response
    """A request, or what is said in the place of one that never became one."""
    stays: bool
    """Is the connection kept open behind it?"""


class Edge:
    """All connections of a server; made and used on the event loop.

    Args:
        answer: makes the response to a request; neither it nor what is under way may raise.
        refuse: makes the response to what never became a request, from a status and a message.
        max_body_bytes: largest body.
        idle_s: longest time that an idle or stuck connection is kept, in whole seconds.
    """

    def __init__(
        self,
        answer: Answer,
        refuse: Callable[[int, str], Response],
        max_body_bytes: int,
        idle_s: int = IDLE_S,
    ) -> None:
        self.answer, self.refuse, self.max_body_bytes = answer, refuse, max_body_bytes
        self.connections: set[Connection] = set()
        self.second = 0
        """Counts seconds: a clock that costs a connection nothing."""
        self.draining = False
        self._idle_s = idle_s
        self._emptied = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def listen(self, listener: socket.socket) -> None:
        """Accept connections from now on."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), sock=listener, backlog=BACKLOG
        )
        self._sweeper = asyncio.create_task(self._sweep())

    def drain(self) -> None:
        """End each connection with its next answer."""
        self.draining = True

    async def close(self, patience_s: float) -> None:
        """Accept no more, and finish what was begun; what is not done in time gets 503."""
        self.draining = True
        assert self._server is not None
        self._server.close()
        for connection in tuple(self.connections):
            connection.close_if_idle()
        await self._until_empty(patience_s)
        for connection in tuple(self.connections):
            connection.give_up()
        await self._until_empty(1.0)
        self._sweeper.cancel()

    async def _until_empty(self, patience_s: float) -> None:
        if self.connections:
            self._emptied.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), patience_s)

    async def _sweep(self) -> None:
        """Once a second, close what is idle or stuck: no timer is set for a request."""
        while True:
            await asyncio.sleep(1)
            self.second += 1
            for connection in tuple(self.connections):
                connection.close_if_stuck(self.second - self._idle_s)

    def lost(self, connection: Connection) -> None:
        """A connection is over."""
        self.connections.discard(connection)
        if not self.connections:
            self._emptied.set()


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._parser: Any = httptools.HttpRequestParser(self)
        self._since = edge.second
        self._turns: deque[_Turn] = deque()  # behind the one that is answered
        self._pending: Pending | None = None  # the answer that is under way
        self._stays = self._head_alone = False  # what it is answered to: is more to come, is no body wanted
        self._paused = False  # the client does not take its answers
        self._deaf = False  # nothing more is read as a request
        self._ended = False  # nothing more is answered
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = self._body_bytes = 0
        self._body: list[bytes] = []
        self._in_head = self._in_message = self._unchecked = self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = cast("asyncio.Transport", transport)
        self._edge.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """It hung up, or was hung up on."""
        self._ended = True
        self._parser = None
        self._edge.lost(self)
        self._turns.clear()
        if self._pending is not None:
            self._pending.cancel()

    def pause_writing(self) -> None:
        """It does not take what it is sent."""
        self._paused = True

    def resume_writing(self) -> None:
        """It does again."""
        self._paused, self._since = False, self._edge.second
        self._next()

    # What comes in.

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, of several, or of none."""
        if self._deaf:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True
        except httptools.HttpParserError as error:
            self._refuse(400, f"not HTTP: {error}", stays=False)
        if self._in_message:
            self._check(len(data))

    def _check(self, more: int) -> None:
        """Look at a request that is not whole yet: may it go on?"""
        if self._in_head:
            self._head_bytes += more
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the head is larger than {MAX_HEAD_BYTES} bytes", stays=False)
        elif self._unchecked:
            self._unchecked = False
            if int(self._headers.get(b"content-length", 0)) > self._edge.max_body_bytes:
                self._refuse_body()
            elif self._headers.get(b"expect", b"").lower() == b"100-continue" and self._pending is None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_message_begin(self) -> None:
        """A request begins; like all `on_...` called by the parser."""
        self._in_head = self._in_message = self._unchecked = True
        self._since = self._edge.second
        self._url, self._headers, self._body, self._body_bytes, self._head_bytes = b"", {}, [], 0, 0

    def on_url(self, url: bytes) -> None:
        """A piece of its target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; what comes behind the body, of a chunked one, is left out."""
        if self._in_head:
            self._headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        """Its body comes next."""
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        """A piece of its body."""
        self._body_bytes += len(body)
        if self._refused:
            return
        if self._body_bytes > self._edge.max_body_bytes:
            self._refuse_body()
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """It is whole."""
        self._in_message = False
        if self._refused:
            self._refused = False
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        path, query = _target(self._url)
        parser = self._parser
        request = Request(_method(parser.get_method()), path, body, query, self._headers)
        # What follows an upgrade is no HTTP for the parser: it is answered as what it is without one, as the last.
        self._answer(request, parser.should_keep_alive() and not parser.should_upgrade())

    def _refuse_body(self) -> None:
        # The connection stays open: what the client still sends is read away, or it would see a reset, not this.
        self._refused, self._body = True, []
        largest = self._edge.max_body_bytes
        self._refuse(413, f"the body is larger than {largest} bytes", self._parser.should_keep_alive())

    def _refuse(self, status: int, message: str, stays: bool) -> None:
        if not stays:
            self._deaf, self._in_head, self._in_message = True, False, False
        self._answer(self._edge.refuse(status, message), stays)

    # What goes out.

    def _answer(self, ask: Request | Response, stays: bool) -> None:
        """Answer now, or when all that came before is answered; behind the last answer nothing."""
        if self._ended:  # it came in the same bytes
            return
        if self._pending is None and not self._paused and not self._turns:
            self._begin(ask, stays)
            return
        self._turns.append(_Turn(ask, stays))
        if len(self._turns) == MAX_PIPELINED:
            self._transport.pause_reading()

    def _begin(self, ask: Request | Response, stays: bool) -> None:
        self._stays, self._head_alone = stays, False
        if isinstance(ask, Request):
            self._head_alone = ask.method == "HEAD"
            answer = self._edge.answer(ask, self._reply)
            if not isinstance(answer, Response):
                self._pending = answer
                return
            ask = answer
        self._write(ask)

    def _reply(self, response: Response) -> None:
        """What was under way is done; nobody hears it if it was given up."""
        if self._pending is None:
            return
        self._pending = None
        self._write(response)
        if self._turns:
            self._next()

    def _next(self) -> None:
        while self._turns and self._pending is None and not self._paused:
            if len(self._turns) == MAX_PIPELINED:
                self._transport.resume_reading()
            self._begin(*self._turns.popleft())

    def _write(self, response: Response) -> None:
        transport, edge = self._transport, self._edge
        if transport.is_closing():
            return
        stays = self._stays and not edge.draining
        body = response.body
        head = _head(response.status, response.headers, stays)
        transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), b"" if self._head_alone else body))
        self._since = edge.second
        if not stays:
            self._end()

    def _end(self) -> None:
        """Close behind the last answer; while the client may still be sending, only our side: it would see a reset."""
        self._turns.clear()
        if self._deaf or self._refused:
            self._transport.write_eof()
        else:
            self._transport.close()
        self._deaf = self._ended = True

    # Its end, by the edge.

    def close_if_idle(self) -> None:
        """Close it unless a request is on its way or being answered."""
        if self._pending is None and not self._turns and not self._in_message:
            self._transport.close()

    def close_if_stuck(self, second: int) -> None:
        """Close it if nothing moved since `second` and the client is to blame."""
        if self._since >= second or (self._pending is not None and not self._paused):
            return
        if self._paused or not self._in_message or self._refused:
            self._transport.abort()
        else:
            self._refuse(408, "the request did not become whole in time", stays=False)
            self._transport.close()

    def give_up(self) -> None:
        """Say 503 in place of what is not done yet, and close."""
        if self._pending is not None:
            self._turns.clear()
            self._pending.cancel()
            self._reply(self._edge.refuse(503, STOPPED))
        elif self._in_message and not self._refused:
            self._refuse(503, STOPPED, stays=False)
            self._transport.close()
        else:
            self._transport.abort()


_METHODS = {name.encode(): name for name in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH")}


def _method(name: bytes) -> str:
    return _METHODS.get(name) or name.decode("latin-1")


@functools.lru_cache(maxsize=256)
def _target(url: bytes) -> tuple[str, bytes]:
    """Part a request's target into its path, decoded, and its query."""
    if not url.startswith(b"/"):
        return _foreign(url)
    path, _, query = url.partition(b"?")
    return _path(path), query


def _foreign(url: bytes) -> tuple[str, bytes]:
    """Read http://host/path as proxies send it; anything else, such as *, is no path of ours."""
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserError:
        return url.decode("latin-1"), b""
    return _path(parsed.path or b"/"), parsed.query or b""


def _path(path: bytes) -> str:
    return unquote_to_bytes(path).decode("utf-8", "replace")


@functools.lru_cache(maxsize=256)
def _head(status: int, headers: tuple[tuple[bytes, bytes], ...], stays: bool) -> bytes:
    """Write the head down to the length's value; answers have few different ones."""
    lines = [b"HTTP/1.1 %d %b" % (status, _phrase(status))]
    lines += [b"%b: %b" % header for header in headers]
    if not stays:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b"content-length: "])


def _phrase(status: int) -> bytes:
    return HTTPStatus(status).phrase.encode()
