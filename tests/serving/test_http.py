"""The wire: what a careless, slow or hostile client gets."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.errors import StackError
from slipway.serving import http
from slipway.serving.http import HttpServer, Request, Response
from tests.conftest import free_port
from tests.serving.conftest import Replica
from tests.serving.packages import key

BODY = json.dumps({"history": [key(3)], "k": 1}).encode()


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


def test_a_connection_serves_many_requests_in_order(replica: Replica) -> None:
    with connected(replica) as client:
        requests = [json.dumps({"history": [key(n)], "k": 1}).encode() for n in range(1, 41)]
        client.sendall(b"".join(head(len(body)) + body for body in requests[:-1]))  # pipelined
        client.sendall(head(len(requests[-1]), "Connection: close") + requests[-1])
        answers = read_all(client)
    expected = [replica.post("/v1/recommend", body).json["items"][0]["item"] for body in requests]
    shown = [json.loads(part.split(b"\r\n\r\n")[1])["items"][0]["item"] for part in answers.split(b"HTTP/1.1 200")[1:]]
    assert shown == expected


def test_a_chunked_body_is_read(replica: Replica) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY))) + b"0\r\n\r\n"
    start = b"POST /v1/recommend HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with connected(replica) as client:
        client.sendall(start + chunks)
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_too_large_gets_413_before_it_is_read(replica: Replica, declared: bool) -> None:
    with connected(replica) as client:
        if declared:
            client.sendall(head(1 << 30))
        else:
            client.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
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


def test_a_client_that_asks_first_is_told_to_continue(replica: Replica) -> None:
    with connected(replica) as client:
        client.sendall(head(len(BODY), "Expect: 100-continue", "Connection: close"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY)
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")
    with connected(replica) as client:
        client.sendall(head(1 << 30, "Expect: 100-continue"))
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # the hello of TLS
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 900_000, 431),
        (b"GET /v2 HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /" + b"x" * 900_000, 431),
    ],
    ids=["TLS", "garbage", "two lengths", "negative length", "endless header", "many headers", "endless path"],
)
def test_what_is_no_request_is_refused(replica: Replica, sent: bytes, status: int) -> None:
    with connected(replica) as client:
        client.sendall(sent)
        assert read_all(client).startswith(b"HTTP/1.1 %d " % status)


def test_head_gets_no_body_and_an_old_client_a_closed_connection(replica: Replica) -> None:
    with connected(replica) as client:
        client.sendall(b"HEAD /v2/health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = read_all(client)
    assert b"Content-Length: 13\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")
    with connected(replica) as client:
        client.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
        assert read_all(client).endswith(b'{"live":true}')


def test_an_upgrade_is_answered_without_one(replica: Replica) -> None:
    with connected(replica) as client:
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert read_all(client).endswith(b'{"live":true}')


async def echo(request: Request) -> Response:
    return Response(200, request.body)


def refuse(status: int, message: str) -> Response:
    return Response(status, message.encode())


@asynccontextmanager
async def serving(max_body_bytes: int = 1000) -> AsyncIterator[tuple[HttpServer, int]]:
    server, port = HttpServer(echo, refuse, max_body_bytes), free_port()
    await server.listen(port)
    try:
        yield server, port
    finally:
        await server.drain(0, 1)


@given(
    bodies=st.lists(st.binary(max_size=300), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=50),
    chunked=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_requests_are_the_same_however_the_network_cuts_them(
    bodies: list[bytes], cuts: list[int], chunked: bool
) -> None:
    async def exchange() -> None:
        async with serving() as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stream = b"".join(_framed(body, chunked) for body in bodies)
            for cut in cuts:
                writer.write(stream[:cut])
                stream = stream[cut:]
                await asyncio.sleep(0)
            writer.write(stream)
            for body in bodies:
                answer = await reader.readuntil(b"\r\n\r\n")
                assert f"Content-Length: {len(body)}\r\n".encode() in answer
                assert await reader.readexactly(len(body)) == body
            writer.close()

    asyncio.run(exchange())


def _framed(body: bytes, chunked: bool) -> bytes:
    start = b"POST / HTTP/1.1\r\nHost: h\r\n"
    if not chunked:
        return start + b"Content-Length: %d\r\n\r\n" % len(body) + body
    whole = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return start + b"Transfer-Encoding: chunked\r\n\r\n" + whole + b"0\r\n\r\n"


def test_a_client_too_slow_gets_408_and_an_idle_one_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_S", 0.2)
    monkeypatch.setattr(http, "IDLE_S", 0.2)

    async def exchange() -> None:
        async with serving() as (server, port):
            slow_reader, slow = await asyncio.open_connection("127.0.0.1", port)
            idle_reader, idle = await asyncio.open_connection("127.0.0.1", port)
            slow.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nabc")
            began = time.monotonic()
            assert (await slow_reader.read()).startswith(b"HTTP/1.1 408 ")
            assert await idle_reader.read() == b""
            assert time.monotonic() - began < 5
            slow.close()
            idle.close()
            while server.connections:
                await asyncio.sleep(0.01)

    asyncio.run(exchange())


def test_a_client_that_reads_no_answers_is_neither_served_on_nor_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_S", 0.5)

    async def exchange() -> None:
        async with serving(max_body_bytes=1 << 20) as (server, port):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                body = b"x" * (1 << 20)
                sending = loop.sock_sendall(client, _framed(body, chunked=False) * 200)
                with pytest.raises(ConnectionError):  # the server stops reading, then hangs up
                    await asyncio.wait_for(sending, 10)
            while server.connections:
                await asyncio.sleep(0.01)

    asyncio.run(exchange())


def test_a_port_in_use_is_named() -> None:
    async def twice() -> None:
        async with serving() as (_, port):
            with pytest.raises(StackError, match=f"port {port}: in use"):
                await HttpServer(echo, refuse, 1000).listen(port)

    asyncio.run(twice())


def test_a_client_that_hangs_up_withdraws_its_request() -> None:
    async def exchange() -> None:
        begun, withdrawn = asyncio.Event(), asyncio.Event()

        async def never(request: Request) -> Response:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                withdrawn.set()
                raise
            raise AssertionError("nobody sets the event")

        server, port = HttpServer(never, refuse, 1000), free_port()
        await server.listen(port)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        await asyncio.wait_for(begun.wait(), 5)
        writer.close()
        await asyncio.wait_for(withdrawn.wait(), 5)
        await server.drain(0, 1)

    asyncio.run(exchange())
