"""Pools: the decision in Lua, the routes through real nginx, and the replicas of a pool as processes."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from slipway import artifacts, config
from slipway.errors import PlatformError
from slipway.params import Params, PoolParams, PoolsParams
from slipway.platforms.base import Routing
from slipway.platforms.local import gateway, programs
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.platform import LocalPlatform
from slipway.platforms.local.supervisor import Supervisor
from slipway.platforms.local.unix_http import UnixConnection
from slipway.release.replay import Replay
from tests.conftest import ROOT, free_port, needs, until
from tests.platforms import stand

pytestmark = needs("nginx")

LUA = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr warn;
load_module "{modules}/ndk_http_module.so"; load_module "{modules}/ngx_http_lua_module.so";
events {{}}
http {{
    access_log off;
    client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    client_body_buffer_size 1m; lua_package_path "{lua}/?.lua;;";
    server {{ listen "unix:{socket}"; location / {{ content_by_lua_block {{
        ngx.req.read_body()
        local cjson, pools = require "cjson", require "slipway.pools"
        local asked = cjson.decode(ngx.req.get_body_data())
        local state, found = pools.start(0), {{}}
        for at, step in ipairs(asked.steps) do
            state = pools.decide(state, asked.limits, step[1], step[2], {{ step[3], step[4] }})
            found[at] = {{ state.wanted, state.weight }}
        end
        ngx.say(cjson.encode(found))
    }} }} }}
}}
"""
LIMITS = {"low_rps": 100, "high_rps": 500, "dwell_s": 60}
Step = tuple[float, float, bool, bool]
Decide = Callable[[list[Step]], list[tuple[int, float]]]


@pytest.fixture(scope="module")
def decide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decide]:
    """Steps (time, rate, ready, ready) -> what is wanted and the second pool's share after each, in nginx's own Lua."""
    folder = tmp_path_factory.mktemp("lua")
    text = LUA.format(modules=gateway.MODULES, lua=ROOT / "infra/nginx/lua", socket=folder / "socket")
    (folder / "nginx.conf").write_text(text)
    command = [programs.find("nginx") or "nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    server = subprocess.Popen(command)
    while not (folder / "socket").exists():
        assert server.poll() is None
        time.sleep(0.01)

    def ask(steps: list[Step]) -> list[tuple[int, float]]:
        with closing(UnixConnection(folder / "socket", 10)) as connection:
            connection.request("POST", "/", json.dumps({"limits": LIMITS, "steps": steps}))
            return [(wanted, weight) for wanted, weight in json.loads(connection.getresponse().read())]

    yield ask
    server.terminate()
    server.wait(10)


def steps(*spans: tuple[float, float], ready: tuple[bool, bool] = (True, True)) -> list[Step]:
    """Spans of (seconds, rate), a step each second."""
    rates = [rate for seconds, rate in spans for _ in range(int(seconds))]
    return [(float(second), rate, *ready) for second, rate in enumerate(rates, start=1)]


def test_between_the_limits_nothing_moves(decide: Decide) -> None:
    assert {wanted for wanted, _ in decide(steps((200, 499.9)))} == {1}
    found = decide(steps((1, 500), (200, 100)))
    assert {wanted for wanted, _ in found} == {2}
    assert found[-1] == (2, 1)


def test_users_move_over_some_seconds_in_either_direction(decide: Decide) -> None:
    found = decide(steps((10, 600), (80, 99)))
    assert [round(weight, 3) for _, weight in found[:6]] == [0.2, 0.4, 0.6, 0.8, 1, 1]
    back = [wanted for wanted, _ in found].index(1, 10)
    assert back == 70, "after 60 s under the lower limit"
    assert [round(weight, 3) for _, weight in found[back - 1 : back + 6]] == [1, 0.8, 0.6, 0.4, 0.2, 0, 0]


def test_a_rate_that_swings_does_not_flap(decide: Decide) -> None:
    found = [wanted for wanted, _ in decide(steps(*[(20, 700), (40, 50)] * 20))]
    assert sum(a != b for a, b in pairwise(found)) == 0, "never 60 s low: it stays"
    found = [wanted for wanted, _ in decide(steps(*[(1, 700), (61, 50)] * 10))]
    assert sum(a != b for a, b in pairwise(found)) <= 20, "two in 60 s at most"


def test_nobody_moves_to_a_pool_that_is_not_ready(decide: Decide) -> None:
    late = steps((20, 900), ready=(True, False)) + [(21.0 + s, 900.0, True, True) for s in range(5)]
    found = decide(late)
    assert {weight for _, weight in found[:20]} == {0}
    assert found[19][0] == 2, "it is wanted meanwhile"
    assert found[-1] == (2, 1)


@dataclass
class Backend:
    """A replica that tells its pool, and how many it had at once."""

    pool: str
    delay_s: float = 0.0
    port: int = field(default_factory=free_port)
    under_way: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> ThreadingHTTPServer:
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.tell()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with backend.lock:
                    backend.under_way += 1
                    backend.most = max(backend.most, backend.under_way)
                time.sleep(backend.delay_s)
                with backend.lock:
                    backend.under_way -= 1
                self.tell()

            def tell(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(backend.pool)))
                self.end_headers()
                self.wfile.write(backend.pool.encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Params]:
    chosen = stand.params().model_copy(update={"pools": PoolsParams(batch_in_flight=4)})
    with stand.running(tmp_path_factory.mktemp("home"), chosen, ["gateway"]) as up:
        yield up.params


@pytest.fixture
def backends(params: Params) -> Iterator[dict[str, Backend]]:
    """Two realtime pools and one for batch, of a replica each, in force."""
    made = {name: Backend(name, 0.05 if name == "nightly" else 0.0) for name in ("small", "large", "nightly")}
    servers = [backend.start() for backend in made.values()]
    replicas = [{"name": b.pool, "port": b.port, "serving": True, "pool": b.pool} for b in made.values()]
    pools: dict[str, Any] = {"realtime": ["small", "large"], "batch": "nightly", "prices": dict.fromkeys(made, 0.5)}
    gateway.put(
        Layout(config.home()),
        {
            "routing": {"champion": "1", "canary": None, "canary_weight": 0},
            "deployments": {"1": {"replicas": replicas}},
            "pools": {**pools, "low_rps": 5, "high_rps": 20, "dwell_s": 60},
        },
    )
    yield made
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(params: Params, request_class: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", params.stack.gateway_port, timeout=15)
    try:
        connection.request("POST", "/v1/recommend", b"{}", {"X-Request-Class": request_class})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_class_has_its_pool_and_batch_its_places(params: Params, backends: dict[str, Backend]) -> None:
    with ThreadPoolExecutor(20) as clients:
        batch = list(clients.map(lambda _: ask(params, "batch"), range(60)))
    assert {ask(params, "realtime") for _ in range(10)} == {(200, "small")}
    assert set(batch) == {(200, "nightly")}
    assert backends["nightly"].most <= 4


def test_the_rate_moves_the_users_and_the_metrics_tell(params: Params, backends: dict[str, Backend]) -> None:
    assert [ask(params, "realtime") for _ in range(5)] == [(200, "small")] * 5
    seen: list[tuple[int, str]] = []
    deadline = time.monotonic() + 20
    while (200, "large") not in seen[-3:] and time.monotonic() < deadline:  # well over 20/s
        seen += [ask(params, "realtime") for _ in range(20)]
        time.sleep(0.1)
    assert {status for status, _ in seen} == {200}
    assert (200, "large") in seen
    metrics = stand.counters(params, "slipway_gateway_pool")
    assert metrics['_switches_total{pool="large"}'] == 1
    assert metrics['_wanted{pool="large"}'] == 1
    assert metrics['_replicas{pool="nightly",state="ready"}'] == 1


def test_a_version_runs_in_every_pool_and_batch_when_nobody_else_does(tmp_path: Path) -> None:
    kinds = (
        PoolParams(name="one", replicas=1, price_per_hour=0.1),
        PoolParams(name="other", engine="onnxruntime", threads=2, max_batch=64),
        PoolParams(name="night", requests="batch", replicas=1),
    )
    chosen = stand.params().model_copy(update={"pools": PoolsParams(kinds=kinds)})
    with stand.running(tmp_path / "h", chosen, ["redis", "gateway"]) as up:
        stand.publish("1")
        platform = up.platform
        platform.deploy("ranker", "1", 2, 60)
        platform.route(Routing("1"))
        document = json.loads(Layout(config.home()).platform_file.read_text())
        replicas = {replica["name"]: replica["pool"] for replica in document["deployments"]["1"]["replicas"]}
        assert sorted(replicas.values()) == ["night", "one", "other", "other"]
        running = Supervisor(Layout(config.home())).processes()
        for name, pool in replicas.items():
            assert os.sched_getscheduler(running[name].pid) == (os.SCHED_IDLE if pool == "night" else os.SCHED_OTHER)
        told = gateway.state(Layout(config.home()))["pools"]
        assert [(each["name"], each["price_per_hour"]) for each in told] == [("one", 0.1), ("other", 0), ("night", 0)]
        serve = json.loads(_environment(running[next(n for n, p in replicas.items() if p == "other")].pid))
        assert (serve["threads"], serve["max_batch"], serve["engine"]) == (2, 64, "onnxruntime")
        platform.deploy("ranker", "1", 1, 60)
        assert len(platform.status().replicas["1"]) == 3
        LocalPlatform(chosen.model_copy(update={"pools": PoolsParams()})).deploy("ranker", "1", 1, 60)
        assert [replica.ready for replica in platform.status().replicas["1"]] == [True]


def test_where_new_replicas_fail_those_that_serve_stay_as_they_are(tmp_path: Path) -> None:
    with stand.running(tmp_path / "h", stand.params(), ["redis", "gateway"]) as up:
        package = stand.publish("1") / "package"
        up.platform.deploy("ranker", "1", 2, 60)
        up.platform.route(Routing("1"))
        before = artifacts.read_json(Layout(up.home).platform_file)
        (package / "items.json").write_bytes(b"{}")
        other = up.params.model_copy(update={"pools": PoolsParams(kinds=(PoolParams(name="other"),))})
        with Replay(up.platform.gateway_url, "/v1/recommend", stand.samples(), 100) as users:
            with pytest.raises(PlatformError, match="ended before it was ready"):
                LocalPlatform(other).deploy("ranker", "1", 1, 60)
            until(lambda: len(users.answers) > 20)
        assert users.figures().failed == 0
        assert artifacts.read_json(Layout(up.home).platform_file) == before
        running = Supervisor(Layout(up.home)).processes()
        assert {name for name in running if name.startswith("ranker-")} == {"ranker-1-1", "ranker-1-2"}


def _environment(pid: int) -> str:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(pair.partition("=")[2] for pair in pairs if pair.startswith("SLIPWAY_SERVE="))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kinds": [{"name": "a", "requests": "batch"}]}, "one or two for realtime"),
        ({"kinds": [{"name": "a"}, {"name": "a"}]}, "names of their own"),
        ({"low_rps": 600.0}, "low_rps must be under high_rps"),
    ],
)
def test_pools_that_make_no_sense_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        PoolsParams.model_validate(given)
