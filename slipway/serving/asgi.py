"""The edge to ASGI: bodies come in piece by piece under their limit, and who hangs up withdraws the request.

Frames and connections are uvicorn's; large heads and slow clients meet nginx before they meet this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case."""
Event = Mapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


class Request(NamedTuple):
    """One whole request."""

    method: str
    path: str
    body: bytes
    query: bytes = b""
    """What stands behind the question mark, as it came."""
    headers: Headers = ()

    def header(self, name: bytes) -> bytes | None:
        """Give a header's first value; `name` in lower case."""
        return next((value for key, value in self.headers if key == name), None)


class Response(NamedTuple):
    """One answer; the length is told by the edge."""

    status: int
    body: bytes
    headers: Headers


class DisconnectedError(Exception):
    """The client hung up before it was answered."""


class TooLargeError(Exception):
    """The body is larger than allowed."""


class Edge:
    """The ASGI callable.

    Args:
        answer: makes the response to a request; it must not raise.
        refuse: makes the response to what never became a request, from a status and a message.
        max_body_bytes: largest body.
    """

    def __init__(
        self,
        answer: Callable[[Request], Awaitable[Response]],
        refuse: Callable[[int, str], Response],
        max_body_bytes: int,
    ) -> None:
        self._answer, self._refuse, self._max_body_bytes = answer, refuse, max_body_bytes

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            response = await self._respond(scope, receive)
        except DisconnectedError:
            return
        except TooLargeError:
            # The connection stays open: what the client still sends is read away, or it would see a reset, not this.
            response = self._refuse(413, f"the body is larger than {self._max_body_bytes} bytes")
        except asyncio.CancelledError:  # by uvicorn, at the end of a drain that took too long
            response = self._refuse(503, "this replica was stopped before it could answer; try again")
        headers = (*response.headers, (b"content-length", b"%d" % len(response.body)))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    async def _respond(self, scope: Event, receive: Receive) -> Response:
        body = await self._body(scope, receive)
        request = Request(scope["method"], scope["path"], body, scope["query_string"], scope["headers"])
        task = asyncio.current_task()
        assert task is not None
        watch = asyncio.create_task(_cancel_when_gone(receive, task))
        try:
            return await self._answer(request)
        except asyncio.CancelledError:
            if watch.done():
                raise DisconnectedError from None
            raise
        finally:
            watch.cancel()

    async def _body(self, scope: Event, receive: Receive) -> bytes:
        """Read the whole body, but never much more than is allowed."""
        if any(name == b"content-length" and int(value) > self._max_body_bytes for name, value in scope["headers"]):
            raise TooLargeError
        body, more = bytearray(), True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise DisconnectedError
            body += event["body"]
            more = event["more_body"]
            if len(body) > self._max_body_bytes:
                raise TooLargeError
        return bytes(body)


async def _cancel_when_gone(receive: Receive, task: asyncio.Task[Any]) -> None:
    """Withdraw a request once its client hung up: nothing else comes after a whole body."""
    await receive()
    task.cancel()
