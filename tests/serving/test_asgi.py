"""The edge on the wire: bodies in pieces, their limit, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from slipway.serving.asgi import Edge, Request, Response
from tests.serving.conftest import Replica
from tests.serving.packages import key

BODY = json.dumps({"history": [key(3)], "k": 1}).encode()
CHUNKED = b"POST /v1/recommend HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def head(length: int, *lines: str) -> bytes:
    return "\r\n".join(["POST /v1/recommend HTTP/1.1", "Host: h", f"Content-Length: {length}", *lines, "", ""]).encode()


@contextmanager
def connected(replica: Replica) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", replica.port), timeout=10) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    """Read until the server closes."""
    parts = []
    while part := client.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def test_a_body_that_comes_in_pieces_is_read_whole(replica: Replica) -> None:
    pieces = [b"%x\r\n%b\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY))]
    with connected(replica) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(CHUNKED)
        for piece in pieces:
            client.sendall(piece)
        client.sendall(b"0\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_too_large_gets_413_before_it_is_whole(replica: Replica, declared: bool) -> None:
    with connected(replica) as client:
        client.sendall(head(1 << 30, "Connection: close") if declared else CHUNKED)
        if not declared:
            client.sendall(b"11000\r\n" + b"x" * 0x11000 + b"\r\n")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 65536 bytes" in answer


def test_a_client_that_goes_on_sending_still_sees_its_413(replica: Replica) -> None:
    with connected(replica) as client:
        client.sendall(head(1 << 20))
        for _ in range(16):
            client.sendall(b"x" * 65_536)
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_asks_first_is_told_to_continue_or_refused(replica: Replica) -> None:
    with connected(replica) as client:
        client.sendall(head(len(BODY), "Expect: 100-continue", "Connection: close"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY)
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")
    with connected(replica) as client:
        client.sendall(head(1 << 30, "Expect: 100-continue"))
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_head_gets_the_head_alone(replica: Replica) -> None:
    with connected(replica) as client:
        client.sendall(b"HEAD /v2/health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = read_all(client)
    assert b"content-length: 13\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_a_client_that_hangs_up_withdraws_its_request() -> None:
    asked, withdrawn = asyncio.Event(), asyncio.Event()

    async def never(request: Request) -> Response:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            withdrawn.set()
        raise AssertionError("nobody sets the event")

    def refuse(status: int, message: str) -> Response:
        raise AssertionError(message)

    async def exchange() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(Edge(never, refuse, 1000), lifespan="off", ws="none", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        _, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(head(len(BODY)) + BODY)
        await asyncio.wait_for(asked.wait(), 30)
        writer.close()
        await asyncio.wait_for(withdrawn.wait(), 30)
        server.should_exit = True
        await asyncio.wait_for(serving, 30)

    asyncio.run(exchange())
