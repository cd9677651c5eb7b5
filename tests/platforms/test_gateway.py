"""The gateway alone: real nginx, small backends that answer what a test wants."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from slipway import config
from slipway.errors import PlatformError
from slipway.params import Params
from slipway.platforms.local import gateway
from slipway.platforms.local.layout import Layout
from tests.conftest import free_port, needs
from tests.platforms import stand

pytestmark = needs("nginx")
ATTEMPTS = "slipway_gateway_attempts_total"
NOBODY = {"routing": {"champion": None, "canary": None, "canary_weight": 0}, "deployments": {}}


@dataclass
class Backend:
    """A replica that is well and answers every request with one status."""

    status: int
    asked: int = 0
    port: int = field(default_factory=free_port)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                backend.asked += 1
                self.answer(backend.status)

            def answer(self, status: int) -> None:
                body = json.dumps({"port": backend.port}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Params]:
    with stand.running(tmp_path_factory.mktemp("home"), stand.params(), ["gateway"]) as up:
        yield up.params


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that the gateway closed is no news."""


@dataclass
class Service:
    """The gateway with a champion `1` and a canary `2` that everybody is on."""

    url: str
    servers: list[ThreadingHTTPServer] = field(default_factory=list)

    def route(self, layout: Layout, champion: list[Backend], canary: list[Backend]) -> None:
        for backend in champion + canary:
            if backend.status:
                server = Quiet(("127.0.0.1", backend.port), backend.handler())
                threading.Thread(target=server.serve_forever, daemon=True).start()
                self.servers.append(server)
        deployments = {
            version: {
                "workload": "ranker",
                "replicas": [{"name": "r", "port": b.port, "serving": True} for b in backends],
            }
            for version, backends in (("1", champion), ("2", canary))
        }
        routing = {"champion": "1" if champion else None, "canary": "2" if canary else None, "canary_weight": 1.0}
        gateway.put(layout, {"routing": routing, "deployments": deployments})

    def ask(self, path: str = "/v1/recommend", headers: dict[str, str] | None = None) -> tuple[int, str | None, Any]:
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, b"{}", headers or {})) as answer:
                return answer.status, answer.headers["X-Slipway-Version"], json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["X-Slipway-Version"], json.load(error)


@pytest.fixture
def service(params: Params) -> Iterator[Service]:
    service = Service(f"http://127.0.0.1:{params.stack.gateway_port}")
    yield service
    for server in service.servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def layout(params: Params) -> Layout:
    return Layout(config.home())


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_canary_that_fails_is_healed_by_the_champion_and_counted(
    service: Service, layout: Layout, params: Params, status: int
) -> None:
    champion, canary = Backend(200), [Backend(status), Backend(status)]
    service.route(layout, [champion], canary)
    before, good = stand.counters(params, ATTEMPTS), ATTEMPTS + '{version="1",outcome="ok"}'
    already = stand.counters(params, good)
    answers = [service.ask() for _ in range(6)]
    stand.counters(params, good, already, 6)  # waits until the last one is counted
    new = stand.counters(params, ATTEMPTS, before)
    assert [(code, version) for code, version, _ in answers] == [(200, "1")] * 6
    assert new['{version="1",outcome="ok"}'] == 6
    assert new['{version="2",outcome="error"}'] + new['{version="2",outcome="timeout"}'] >= 2


def test_what_a_canary_refuses_the_champion_answers_and_it_counts_against_the_canary(
    service: Service, layout: Layout, params: Params
) -> None:
    champion, canary = Backend(200), [Backend(429), Backend(429)]
    service.route(layout, [Backend(0), champion], canary)  # one of the champion's is dead
    before, good = stand.counters(params, ATTEMPTS), ATTEMPTS + '{version="1",outcome="ok"}'
    already = stand.counters(params, good)
    answers = [service.ask() for _ in range(6)]
    assert [(code, version) for code, version, _ in answers] == [(200, "1")] * 6
    assert sum(backend.asked for backend in canary) == 6, "another replica of the canary was asked"
    stand.counters(params, good, already, 6)  # waits until the last one is counted
    new = stand.counters(params, ATTEMPTS, before)
    assert (new['{version="2",outcome="refused"}'], new['{version="1",outcome="ok"}']) == (6, 6)


@pytest.mark.parametrize("beside", [False, True])
def test_what_the_champion_refuses_is_refused_and_nobody_is_asked_again(
    service: Service, layout: Layout, params: Params, beside: bool
) -> None:
    champion, canary = [Backend(429), Backend(429)], [Backend(429)] if beside else []
    service.route(layout, champion, canary)
    before = stand.counters(params, ATTEMPTS)
    with closing(http.client.HTTPConnection(service.url.removeprefix("http://"))) as connection:
        for _ in range(4):
            connection.request("POST", "/v1/recommend", b"{}")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["X-Slipway-Version"]) == (429, "1")
            assert "more requests wait" in answer.read().decode() or not beside
            assert not answer.will_close, "the client has to connect anew"
    asked = [sum(backend.asked for backend in backends) for backends in (champion, canary)]
    assert asked == [4, 4 * beside]
    new = stand.counters(params, ATTEMPTS, before, 4 + 4 * beside)
    assert new['{version="1",outcome="refused"}'] == 4
    assert {one["in_flight"] for one in gateway.state(layout)["replicas"].values()} == {0}


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/recommend", {"X-Request-Class": "batch"}),
        ("/v2/models/ranker/versions/2/infer", {}),
        ("/v1/recommend", None),
    ],
)
def test_batch_requests_named_versions_and_a_first_release_get_the_canarys_own_refusal(
    service: Service, layout: Layout, path: str, headers: dict[str, str] | None
) -> None:
    champion, canary = Backend(200), [Backend(429), Backend(429)]
    service.route(layout, [] if headers is None else [champion], canary)
    code, version, answer = service.ask(path, headers)
    assert (code, version) == (429, "2"), answer
    assert (champion.asked, sum(backend.asked for backend in canary)) == (0, 1)


def test_where_no_replica_is_left_the_answer_is_503_with_its_reason(service: Service, layout: Layout) -> None:
    service.route(layout, [Backend(200)], [])
    document = {
        "routing": {"champion": "3", "canary": None, "canary_weight": 0},
        "deployments": {"3": {"replicas": []}},
    }
    gateway.put(layout, document)
    code, _, answer = service.ask()
    assert (code, answer["error"][:18]) == (503, "no replica is left")


@pytest.mark.parametrize("status", [400, 404, 413])
def test_what_the_client_did_wrong_is_tried_once(service: Service, layout: Layout, status: int) -> None:
    champion, canary = Backend(200), Backend(status)
    service.route(layout, [champion], [canary])
    assert service.ask()[:2] == (status, "2")
    assert (champion.asked, canary.asked) == (0, 1)


def test_when_all_fail_the_client_gets_the_last_failure_as_json(service: Service, layout: Layout) -> None:
    service.route(layout, [Backend(500)], [Backend(500)])
    assert service.ask()[0] == 500
    service.route(layout, [Backend(0)], [])  # nobody listens there
    code, _, answer = service.ask()
    assert code == 502
    assert "every replica that was tried failed" in answer["error"]


def test_a_version_without_replicas_is_healed_by_the_champion_and_counted(
    service: Service, layout: Layout, params: Params
) -> None:
    service.route(layout, [Backend(200)], [Backend(0)])
    before = stand.counters(params, ATTEMPTS)
    assert [service.ask()[:2] for _ in range(5)] == [(200, "1")] * 5
    new = stand.counters(params, ATTEMPTS, before, 6)
    assert new['{version="2",outcome="error"}'] >= 1


def test_feedback_goes_to_the_champion_and_a_named_version_to_itself(service: Service, layout: Layout) -> None:
    service.route(layout, [Backend(200)], [Backend(200)])
    assert service.ask()[1] == "2"
    assert service.ask("/v1/feedback")[1] == "1"
    assert service.ask("/v2/models/ranker/versions/1/infer")[1] == "1"


@pytest.mark.parametrize(
    "document",
    [
        {"routing": {"champion": None, "canary": None, "canary_weight": 1.5}, "deployments": {}},
        {"routing": {"champion": None, "canary": None, "canary_weight": 0}, "deployments": {"1": 3}},
        {"deployments": {}},
        {**NOBODY, "pools": {"realtime": ["small"], "prices": {}}},
        {**NOBODY, "pools": {"realtime": ["small"], "batch": "nightly", "prices": {"small": 0.1}}},
        {},
    ],
)
def test_a_document_that_makes_no_sense_is_refused_and_the_old_one_stays(
    service: Service, layout: Layout, document: Any
) -> None:
    service.route(layout, [Backend(200)], [])
    with pytest.raises(PlatformError, match="the gateway refuses the state"):
        gateway.put(layout, document)
    assert service.ask()[:2] == (200, "1")


def test_what_was_sent_before_the_state_in_force_is_refused_however_late_it_comes(
    service: Service, layout: Layout
) -> None:
    service.route(layout, [Backend(200)], [])
    stale = json.dumps({**NOBODY, "sent_s": time.monotonic() - 60}).encode()
    with pytest.raises(PlatformError, match="it was sent before the one in force"):
        gateway._call(layout.gateway_socket, "PUT", "/state", stale)
    assert service.ask()[:2] == (200, "1")


def test_without_a_champion_everybody_gets_the_canary(service: Service, layout: Layout) -> None:
    service.route(layout, [], [Backend(200)])
    assert service.ask()[:2] == (200, "2")
