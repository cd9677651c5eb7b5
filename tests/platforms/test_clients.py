"""What the gateway grants a client: real nginx, a backend that tells what reached it."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from slipway import config, loopback, tokens
from slipway.errors import SlipwayError, StackError
from slipway.params import GatewayParams, Params
from slipway.platforms.local import gateway, stack
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.platform import LocalPlatform
from slipway.platforms.local.unix_http import UnixConnection
from slipway.release.replay import Replay
from tests.conftest import ROOT, needs, until
from tests.platforms import stand

pytestmark = needs("nginx")
CLIENTS = "slipway_gateway_client_requests_total"


class Echo(BaseHTTPRequestHandler):
    """Tells the names of the headers that it got; `/slow` when it may."""

    protocol_version = "HTTP/1.1"
    slow: ClassVar[threading.Semaphore] = threading.Semaphore(0)
    go: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/slow"):
            self.slow.release()
            self.go.wait(10)
        body = json.dumps({"headers": sorted(name.lower() for name in self.headers)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815  # the name is the base class's

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Door:
    """A gateway in front of an echo."""

    layout: Layout
    params: Params

    def ask(
        self, token: str | None = None, path: str = "/v1/echo", context: ssl.SSLContext | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(gateway.url(self.params) + path, headers=headers)
        try:
            with urllib.request.urlopen(request, context=context, timeout=10) as answer:
                return answer.status, dict(answer.headers), json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), json.load(error)

    def ask_inside(self, path: str = "/v1/echo") -> int:
        with closing(UnixConnection(self.layout.inner_socket, 10)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    stack.down()


@pytest.fixture
def backend() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def open_door(home: Path, port: int, **granted: Any) -> Door:
    params = stand.params().model_copy(update={"gateway": GatewayParams(**granted)})
    stack.up(params, ["gateway"], lambda _: None)
    deployments = {"1": {"workload": "ranker", "replicas": [{"name": "r", "port": port, "serving": True}]}}
    routing = {"champion": "1", "canary": None, "canary_weight": 0.0}
    gateway.put(Layout(home), {"routing": routing, "deployments": deployments})
    return Door(Layout(home), params)


def test_tokens_are_in_force_when_the_command_returns_and_reach_no_replica(home: Path, backend: int) -> None:
    door = open_door(home, backend)
    assert door.ask()[0] == 200, "without a file of tokens the door is open"
    shop, kiosk = tokens.add(door.layout, "shop"), tokens.add(door.layout, "kiosk")
    for path in ("/v1/echo", "/"):
        code, headers, answer = door.ask(path=path)
        assert (code, headers["WWW-Authenticate"]) == (401, 'Bearer realm="slipway"')
        assert "Authorization: Bearer TOKEN" in answer["error"]
    code, headers, _ = door.ask(shop + "x")
    assert (code, headers["WWW-Authenticate"]) == (401, 'Bearer realm="slipway", error="invalid_token"')
    for token in (shop, kiosk):
        code, _, answer = door.ask(token)
        assert code == 200
        assert "authorization" not in answer["headers"]
    assert door.ask_inside() == 200
    tokens.revoke(door.layout, "shop")
    assert (door.ask(shop)[0], door.ask(kiosk)[0]) == (401, 200)
    counted = stand.counters(door.params, CLIENTS, total=8)
    assert {series for series in counted if "shop" in series} == set(), "the series of a revoked client stay"
    assert counted['{client="kiosk",outcome="ok"}'] == 2
    assert counted['{client="slipway",outcome="ok"}'] == 1
    assert counted['{client="denied",outcome="refused"}'] == 4
    tokens.revoke(door.layout, "kiosk")
    assert door.ask()[0] == 401, "an empty file of tokens opens the door"


def test_a_token_is_kept_as_a_hash_in_a_file_of_its_owners(home: Path, backend: int) -> None:
    Layout(home).make()
    token = tokens.add(Layout(home), "shop")  # no gateway runs: it reads the file when it starts
    file = home / "tokens.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert token not in file.read_text()
    door = open_door(home, backend)
    assert (door.ask(token)[0], door.ask()[0]) == (200, 401)
    log = door.layout.log("gateway").read_text()
    assert token not in log


def test_a_file_of_tokens_that_makes_no_sense_closes_the_door(home: Path, backend: int) -> None:
    Layout(home).make()
    (home / "tokens.json").write_text('{"aa": {"client": "shop"}}')
    door = open_door(home, backend)
    assert door.ask()[0] == 401
    assert door.ask_inside() == 200


def test_the_command_adds_lists_and_revokes(home: Path) -> None:
    Layout(home).make()

    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "slipway.tokens", *words], capture_output=True, text=True, check=False, cwd=ROOT
        )
        return done.returncode, done.stdout, done.stderr

    code, token, _ = run("add", "shop")
    assert code == 0
    assert tokens.hashed(token.strip()) in (home / "tokens.json").read_text()
    assert run("add", "shop")[0] == run("add", "Shop!")[0] == run("add", "denied")[0] == 2
    assert run("list")[1].split()[0] == "shop"
    assert run("revoke", "nobody")[2].strip() == "tokens: nobody has no token; there are: shop"
    assert run("revoke", "shop")[0] == 0
    assert run("list")[1] == ""


def test_the_number_of_clients_is_bounded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Layout(home).make()
    monkeypatch.setattr(tokens, "MAX_CLIENTS", 1)
    tokens.add(Layout(home), "one")
    with pytest.raises(SlipwayError, match="which is the most"):
        tokens.add(Layout(home), "two")


def test_a_client_over_its_rate_gets_429_and_no_other_client_and_recovers(home: Path, backend: int) -> None:
    door = open_door(home, backend, rate_rps=5, burst=4)
    shop, kiosk = tokens.add(door.layout, "shop"), tokens.add(door.layout, "kiosk")
    codes = [door.ask(shop)[0] for _ in range(40)]
    assert set(codes) == {200, 429}
    assert codes[:5] == [200] * 5
    code, headers, answer = next(each for each in iter(lambda: door.ask(shop), None) if each[0] == 429)
    assert (code, headers["Retry-After"]) == (429, "1")
    assert "more requests than this client may send" in answer["error"]
    assert door.ask(kiosk)[0] == 200, "one client's rate is another's affair"
    assert {door.ask_inside() for _ in range(20)} == {200}, "the product's own traffic is limited"
    # What is refused is not counted: a client that never lets up still gets its rate, and no more.
    began, served = time.monotonic(), 0
    while served < 10 and time.monotonic() - began < 60:
        served += door.ask(shop)[0] == 200
    assert served == 10
    assert time.monotonic() - began > (10 - 5) / 5, "of ten requests the burst was five at most, the others come at 5/s"
    assert [door.ask("guess")[0] for _ in range(30)].count(429) > 0, "guesses at tokens are not limited"


def test_a_client_has_so_many_requests_under_way_and_no_more(home: Path, backend: int) -> None:
    door = open_door(home, backend, concurrency=2)
    Echo.go.clear()
    with ThreadPoolExecutor(2) as threads:
        slow = [threads.submit(door.ask, path="/v1/slow") for _ in range(2)]
        for _ in slow:
            assert Echo.slow.acquire(timeout=10)
        assert door.ask()[0] == 429
        Echo.go.set()
        assert [each.result()[0] for each in slow] == [200, 200]
    until(lambda: door.ask()[0] == 200)  # the places are free a moment after the answers


def test_who_sends_too_slowly_is_cut_off_and_the_others_are_served(home: Path, backend: int) -> None:
    door = open_door(home, backend, read_s=0.3)
    beginnings = [
        b"POST /v1/echo HTTP/1.1\r\nHost: a\r\n",
        b"POST /v1/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1",
    ]
    with ExitStack() as stack_of:
        slow = [
            stack_of.enter_context(socket.create_connection(("127.0.0.1", door.params.stack.gateway_port)))
            for _ in range(40)
        ]
        for number, client in enumerate(slow):
            client.settimeout(10)
            client.sendall(beginnings[number % 2])
        assert door.ask()[0] == 200
        ends = [b"".join(iter(lambda client=client: receive(client), b"")) for client in slow]  # type: ignore[misc]
    assert all(not end or b" 408 " in end for end in ends)


def receive(client: socket.socket) -> bytes:
    try:
        return client.recv(65_536)
    except ConnectionResetError:
        return b""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "chain.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-out", str(made[0]), "-keyout", str(made[1])], check=True, capture_output=True)
    return made


@needs("openssl", "curl")
def test_with_a_certificate_the_service_speaks_tls_and_the_product_still_reaches_it(
    home: Path, backend: int, certificate: tuple[Path, Path]
) -> None:
    chain, key = certificate
    door = open_door(home, backend, tls_certificate=str(chain), tls_key=str(key))
    trusting = ssl.create_default_context(cafile=str(chain))
    assert gateway.url(door.params).startswith("https:")
    assert door.ask(context=trusting)[0] == 200
    trusting.set_alpn_protocols(["h2"])
    address = ("127.0.0.1", door.params.stack.gateway_port)
    with socket.create_connection(address) as plain, trusting.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
        assert tls.selected_alpn_protocol() == "h2"
        assert tls.version() == "TLSv1.3"
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(address) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain)
    curl = ["curl", "-sS", "--http2", "--cacert", str(chain), "-d", "x" * 100_000, "-o", "/dev/null"]
    told = [*curl, "-w", "%{http_version} %{http_code}", gateway.url(door.params) + "/v1/echo"]
    assert subprocess.run(told, capture_output=True, text=True, check=True).stdout == "2 200"
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.request("GET", "/v1/echo")
    answer = connection.getresponse()
    assert answer.status == 400
    assert "TLS" in json.load(answer)["error"]
    connection.close()
    assert door.ask_inside() == 200
    with Replay(LocalPlatform(door.params).inner_url, "/v1/echo", stand.samples(20), 100) as traffic:
        until(lambda: len(traffic.answers) > 5)
    assert {answer.status for answer in traffic.answers} == {200}


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_starts(home: Path, tmp_path: Path) -> None:
    for name in ("chain.pem", "key.pem"):
        (tmp_path / name).write_text("nothing")
    granted = GatewayParams(tls_certificate=str(tmp_path / "chain.pem"), tls_key=str(tmp_path / "key.pem"))
    with pytest.raises(StackError, match=r"gateway.tls_certificate and tls_key: .*chain.pem"):
        stack.up(stand.params().model_copy(update={"gateway": granted}), ["gateway"], lambda _: None)


def test_orders_are_taken_from_a_socket_of_the_owners_alone(home: Path, backend: int) -> None:
    door = open_door(home, backend)
    for file in (door.layout.gateway_socket, door.layout.inner_socket):
        assert file.stat().st_mode & 0o777 == 0o600
    assert door.layout.run.stat().st_mode & 0o777 == 0o700
    ports = (door.params.stack.gateway_port, door.params.stack.metrics_port)
    for port in ports:
        for path in ("/state", "/tokens"):
            with pytest.raises(urllib.error.HTTPError, match="404") as refused:
                loopback.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", b"{}", method="PUT"))
            refused.value.close()
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    mine = [line.split()[3] for line in listening if line.split()[3].rpartition(":")[2] in map(str, ports)]
    assert sorted(mine) == sorted(f"127.0.0.1:{port}" for port in ports)
    assert config.home() == home
