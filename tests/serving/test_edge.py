"""The edge on the wire: bodies in pieces, their limit, and clients that hang up."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.serving.edge import MAX_PIPELINED, Connection, Edge, Request, Response, in_tasks
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


class Site:
    """An edge in this process, whose handler a test holds open."""

    def __init__(self, edge: Edge, port: int, asked: list[Request], go: asyncio.Event) -> None:
        self.edge, self.port, self.asked, self.go = edge, port, asked, go
        self.withdrawn = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer


def refuse(status: int, message: str) -> Response:
    return Response(status, message.encode(), ())


def at(test: Callable[[Site], Awaitable[None]], idle_s: int = 60, size: int = 0) -> None:
    """Run a test against an edge that answers a request with its path, once it may, padded to a size."""

    site = cast("Site", None)

    async def answer(request: Request) -> Response:
        site.asked.append(request)
        try:
            await site.go.wait()
        except asyncio.CancelledError:
            site.withdrawn += 1
            raise
        return Response(200, f"[{request.path}]".encode().ljust(size), ())

    failures: list[object] = []

    async def run() -> None:
        nonlocal site
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        listener = socket.create_server(("127.0.0.1", 0))
        edge = Edge(in_tasks(answer, refuse), refuse, 1000, idle_s)
        site = Site(edge, listener.getsockname()[1], [], asyncio.Event())
        await site.edge.listen(listener)
        try:
            await asyncio.wait_for(test(site), 30)
        finally:
            for writer in site.writers:
                writer.close()
            await site.edge.close(0.1)

    uvloop.run(run())
    assert not failures


async def true(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def get(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: h", *lines, "", ""]).encode()


def test_a_client_that_hangs_up_withdraws_its_request() -> None:
    async def test(site: Site) -> None:
        _, writer = await site.connect()
        writer.write(head(len(BODY)) + BODY)
        await true(lambda: len(site.asked) == 1)
        writer.close()
        await true(lambda: site.withdrawn == 1)
        assert not site.edge.connections

    at(test)


def test_requests_in_one_go_are_answered_in_order_and_no_more_are_read_than_may_wait() -> None:
    async def test(site: Site) -> None:
        reader, writer = await site.connect()
        writer.write(b"".join(get(f"/{n}") for n in range(MAX_PIPELINED)))
        await true(lambda: len(site.asked) == 1)
        writer.write(head(2000)[:-2] + b"\r\n")
        for _ in range(10_000):  # far more than sockets hold
            writer.write(b"x" * 2000 + head(2000))
        await asyncio.sleep(0.2)
        assert writer.transport.get_write_buffer_size() > 0, "it is read on without an end"
        assert len(site.asked) == 1
        site.go.set()
        found = [await reader.readuntil(b"]") for _ in range(MAX_PIPELINED)]
        assert [text.rpartition(b"\r\n\r\n")[2] for text in found] == [f"[/{n}]".encode() for n in range(MAX_PIPELINED)]
        assert b"413" in await reader.readline()

    at(test)


def test_a_client_that_takes_no_answers_gets_no_more_of_them_and_is_hung_up_on() -> None:
    async def test(site: Site) -> None:
        site.go.set()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", site.port))
            await asyncio.get_running_loop().sock_sendall(client, b"".join(get(f"/{n}") for n in range(10)))
            await true(lambda: len(site.asked) > 0)
            await asyncio.sleep(0.2)
            assert len(site.asked) == 1, "the answers heap up in memory"
            await true(lambda: not site.edge.connections)

    at(test, idle_s=1, size=20_000_000)


def test_idle_connections_and_half_requests_have_their_time() -> None:
    async def test(site: Site) -> None:
        site.go.set()
        idle, half = await site.connect(), await site.connect()
        idle[1].write(get("/"))
        half[1].write(head(10) + b"x")
        assert (await idle[0].read()).endswith(b"[/]")
        assert (await half[0].read()).startswith(b"HTTP/1.1 408 ")

    at(test, idle_s=1)


def test_a_slow_answer_is_no_idle_connection() -> None:
    async def test(site: Site) -> None:
        reader, writer = await site.connect()
        writer.write(get("/"))
        await true(lambda: len(site.asked) == 1)
        site.edge.second += 100
        await true(lambda: site.edge.second > 101)
        site.go.set()
        assert await reader.readuntil(b"]")

    at(test, idle_s=1)


ODD = {
    "garbage": (b"\x16\x03\x01\x02", b"400"),
    "two lengths": (b"POST / HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
    "a length beyond numbers": (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", b"400"),
    "a head without an end": (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, b"431"),
    "many heads without an end": (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, b"431"),
    "an old client": (b"GET /a HTTP/1.0\r\n\r\n", b"[/a]"),
    "a proxy's": (b"GET http://h/a%20b?c HTTP/1.1\r\nConnection: close\r\n\r\n", b"[/a b]"),
    "an upgrade": (b"GET /a HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", b"[/a]"),
    "no path": (b"OPTIONS * HTTP/1.1\r\nConnection: close\r\n\r\n", b"[*]"),
    "data after the last request": (b"GET /a HTTP/1.1\r\nConnection: close\r\n\r\nGET /b HTTP/1.1\r\n\r\n", b"[/a]"),
    "data after one too large": (head(2000, "Connection: close") + b"x" * 2000 + b"GET /b HTTP/1.1\r\n\r\n", b"413"),
}


@pytest.mark.parametrize(("sent", "found"), ODD.values(), ids=ODD)
def test_odd_requests_are_answered_or_refused_and_the_connection_ends(sent: bytes, found: bytes) -> None:
    async def test(site: Site) -> None:
        site.go.set()
        reader, writer = await site.connect()
        writer.write(sent)
        answer = await reader.read()
        assert found in answer
        assert b"[/b]" not in answer

    at(test)


def test_what_stands_behind_a_body_in_pieces_is_no_header() -> None:
    async def test(site: Site) -> None:
        site.go.set()
        reader, writer = await site.connect()
        writer.write(CHUNKED + b"2\r\nab\r\n0\r\nX-User: other\r\n\r\n")
        await reader.read()
        (request,) = site.asked
        assert (request.body, request.header(b"x-user"), request.header(b"host")) == (b"ab", None, b"h")

    at(test)


@settings(max_examples=60, deadline=None)
@given(
    bodies=st.lists(st.one_of(st.none(), st.binary(max_size=1200)), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 4000), max_size=12),
)
def test_requests_are_the_same_however_the_network_cuts_them(bodies: list[bytes | None], cuts: list[int]) -> None:
    parts = []
    for number, body in enumerate(bodies):
        if body is None:
            parts.append(f"POST /{number}?q HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            parts.append(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        else:
            parts.append(f"POST /{number}?q HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    sent = b"".join(parts)
    ends = sorted({0, len(sent), *(cut % len(sent) for cut in cuts)})
    asked: list[Request] = []

    class Transport(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            answers.append(int(bytes(data).split()[1]))

        def is_closing(self) -> bool:
            return False

        def pause_reading(self) -> None:
            raise AssertionError("answers are given at once")

    async def answer(request: Request) -> Response:
        asked.append(request)
        return Response(200, b"", ())

    async def run() -> None:
        connection = Connection(Edge(in_tasks(answer, refuse), refuse, 1000))
        connection.connection_made(Transport())
        for start, end in itertools.pairwise(ends):
            connection.data_received(sent[start:end])
            for _ in range(20):
                await asyncio.sleep(0)

    answers: list[int] = []
    asyncio.run(run())
    wanted = [
        (f"/{n}", b"abcde" if body is None else body) for n, body in enumerate(bodies) if len(body or b"") <= 1000
    ]
    assert [(request.path, request.body) for request in asked] == wanted
    assert answers == [200 if len(body or b"") <= 1000 else 413 for body in bodies]
