"""The live page of a stack that serves and tries a canary, as a browser draws it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipway import loopback
from slipway.monitor import view
from slipway.params import Params
from slipway.platforms.base import Routing
from slipway.platforms.local import stack
from slipway.prometheus import Sample
from slipway.release import history, state
from slipway.release.replay import Replay
from tests.conftest import needs, until
from tests.monitor import browser
from tests.platforms import stand
from tests.platforms.stand import Here

WEIGHTS = (0.05, 0.25, 0.5)
NOBODY = {"champion": "3", "canary": None, "weight": 0.0}


@pytest.fixture(scope="module")
def shown(here: Here) -> Iterator[str]:
    """Address of the page, while users come."""
    stack.up(here.params, ["page", "autoscaler"], tell=lambda _: None)
    for version, replicas in (("3", 2), ("4", 1)):  # the policy's least
        stand.publish(version)
        here.platform.deploy("ranker", version, replicas, timeout_s=60)
    history.append("deploy", "ranker", "4", champion="3", replicas=1)
    here.platform.route(Routing("3", "4", 0.25))
    with Replay(here.platform.gateway_url, "/v1/recommend", stand.samples(), rate_rps=40.0):
        yield f"http://127.0.0.1:{here.params.stack.page_port}/"


def data(shown: str) -> Any:
    with loopback.urlopen(f"{shown}data.json", timeout=10) as answer:
        return json.load(answer)


@needs("nginx", "redis-server", "prometheus")
def test_the_data_of_the_page_are_those_of_the_service(shown: str, here: Here) -> None:
    def rate(now: Any, track: str) -> float:
        return (now["tracks"][track]["rate"][-1] or 0.0) if track in now["tracks"] else 0.0

    def scraped() -> bool:
        now = data(shown)
        rates = rate(now, "canary"), rate(now, "champion")
        return len(now["replicas"]) == 3 and 0 < rates[0] < rates[1] and 10 < rates[1] < 100

    until(scraped)
    now = data(shown)
    assert now["problem"] == ""
    assert now["routing"] == {"champion": "3", "canary": "4", "weight": 0.25}
    assert [(r["name"], r["track"]) for r in now["replicas"]] == [
        ("ranker-3-1", "champion"),
        ("ranker-3-2", "champion"),
        ("ranker-4-1", "canary"),
    ]
    assert 0 < now["tracks"]["champion"]["p99_ms"][-1] < 5000
    assert {p["name"] for p in now["programs"] if p["up"]} == {"autoscaler", "gateway", "prometheus", "redis"}
    assert all(p["memory_bytes"] > 1e6 for p in now["programs"])


@needs("nginx", "redis-server", "prometheus", "chromium")
def test_a_browser_draws_them_and_complains_of_nothing(shown: str, tmp_path: Path) -> None:
    with browser.page(tmp_path / "profile") as page:
        page.open(shown)
        page.wait_for("Number(document.body?.dataset.drawn) >= 2 && !!document.querySelector('#p99 .path.canary')")
        text = page.value("document.body.innerText")
        assert "version 3 serves, version 4 is tried" in text
        tile = "[e.firstChild.innerText, e.children[1].firstChild.data]"
        tiles = dict(page.value(f"[...document.querySelectorAll('.tile')].map(e => {tile})"))
        assert float(tiles["Requests"]) > 5
        assert float(tiles["P99"]) > 0
        assert tiles["On the canary"] == "25"
        assert page.value("[...document.querySelectorAll('#steps .now')].map(e => e.textContent)") == ["25%"]
        assert page.value("[...document.querySelectorAll('#replicas tbody th')].map(e => e.textContent)") == [
            "ranker-3-1",
            "ranker-3-2",
            "ranker-4-1",
        ]
        assert page.value("document.querySelectorAll('#rate .path').length") == 2
        page.wait_for("!document.getElementById('scaling-card').hidden")
        assert "for the champion" in page.value("document.getElementById('scaling-now').textContent")
        assert "cpu" in page.value("document.getElementById('scaling').textContent")
        assert "champion" in page.value("document.getElementById('rate').getAttribute('aria-label')")
        light = page.value("getComputedStyle(document.body).backgroundColor")
        page.dark()
        assert page.value("getComputedStyle(document.body).backgroundColor") != light
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.complaints == []
        # The policy holds: what the page did not bring along does not run.
        page.value(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.x = 1'}))"
        )
        assert page.value("window.x") is None


@needs("nginx", "redis-server", "prometheus")
def test_the_page_is_for_this_machine_alone_and_runs_nothing_from_elsewhere(shown: str, here: Here) -> None:
    with loopback.urlopen(shown, timeout=10) as answer:
        policy = answer.headers["Content-Security-Policy"]
        page = answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"(?:src|href)=", page.split("<script>")[0]) == []
    connection = http.client.HTTPConnection("127.0.0.1", here.params.stack.page_port, timeout=10)
    connection.request("GET", "/data.json", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 404
    connection.close()
    with loopback.urlopen(f"{shown}runbooks/ErrorRatio", timeout=10) as answer:
        assert "<h1>ErrorRatio</h1>" in answer.read().decode()


def test_pools_and_levels_of_the_cache_are_shown_where_there_are_any() -> None:
    pool = {"pool": "cpu"}
    values = [
        Sample("slipway_gateway_pool_weight", pool, 0.75),
        Sample("slipway_gateway_pool_price_per_hour", pool, 0.4),
        Sample("slipway_gateway_pool_replicas", {**pool, "state": "ready"}, 2),
        Sample("slipway_gateway_pool_replicas", {**pool, "state": "out"}, 1),
        Sample("cache:lookups:ratio15s", {"level": "memory"}, 0.9),
        Sample("cache:lookups:ratio15s", {"level": "redis"}, float("nan")),
        Sample("cache:lookup_seconds:mean15s", {"level": "redis"}, 0.0002),
    ]
    shown = view.view(view.Facts(times=[0, 2], values=values), Params())
    assert shown["pools"] == [{"name": "cpu", "weight": 0.75, "ready": 2, "replicas": 3, "price_per_hour": 0.4}]
    assert shown["cache"] == [
        {"level": "memory", "share": 0.9, "lookup_s": None},
        {"level": "redis", "share": None, "lookup_s": 0.0002},
    ]
    assert shown["tracks"]["champion"]["rate"] == [None, None]
    json.dumps(shown, allow_nan=False)


def test_the_autoscaler_is_shown_with_the_metric_that_decides() -> None:
    labels = {"metric": "cpu"}, {"metric": "track:request_seconds:p99_5s"}
    values = [
        Sample("slipway_autoscaler_replicas", {"version": "3"}, 4),
        Sample("slipway_autoscaler_limit_replicas", {"bound": "min"}, 2),
        Sample("slipway_autoscaler_limit_replicas", {"bound": "max"}, 10),
        Sample("slipway_autoscaler_metric_ratio", labels[0], 0.9),
        Sample("slipway_autoscaler_metric_ratio", labels[1], 2.0),
        Sample("slipway_autoscaler_metric_replicas", labels[0], 2),
        Sample("slipway_autoscaler_metric_replicas", labels[1], 4),
    ]
    facts = view.Facts(times=[0, 2], values=values, gateway={"champion": "3", "canary": None, "canary_weight": 0.0})
    assert view.view(facts, Params())["scaling"] == {
        "wanted": 4,
        "least": 2,
        "most": 10,
        "metrics": [
            {"name": "cpu", "ratio": 0.9, "asks": 2, "decides": False},
            {"name": "track:request_seconds:p99_5s", "ratio": 2.0, "asks": 4, "decides": True},
        ],
    }
    assert view.view(view.Facts(times=[0, 2]), Params())["scaling"] is None


def test_who_is_at_work_is_told_as_long_as_he_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    assert state.at_work() == ""
    with state.alone("canary of version 4"):
        assert state.at_work() == "canary of version 4"
    assert state.at_work() == ""


def event(name: str, version: str = "4", **told: Any) -> view.Event:
    return {"event": name, "version": version, "time": "2026-01-02T03:04:05.678+00:00", **told}


@pytest.mark.parametrize(
    ("events", "routing", "at_work", "states"),
    [
        ([], NOBODY, "", ["", "", "", "", "", ""]),
        ([event("deploy")], NOBODY, "deploy of version 4", ["now", "", "", "", "", ""]),
        (
            [event("deploy", "2"), event("promote", "2"), event("deploy")],
            {"champion": "3", "canary": "4", "weight": 0.25},
            "canary of version 4",
            ["done", "done", "now", "", "", ""],
        ),
        (
            [event("deploy"), event("canary", verdict="rollback", weight=0.25, why="slow")],
            {"champion": "3", "canary": "4", "weight": 0.0},
            "",
            ["done", "done", "failed", "", "", ""],
        ),
        (
            [event("deploy"), event("canary", verdict="advance")],
            {"champion": "3", "canary": "4", "weight": 0.5},
            "chaos of version 4",
            ["done", "done", "done", "done", "now", ""],
        ),
        (
            [event("deploy"), event("canary", verdict="advance"), event("chaos", fault="kill", broken=["x"])],
            {"champion": "3", "canary": "4", "weight": 0.5},
            "",
            ["done", "done", "done", "done", "failed", ""],
        ),
        ([event("deploy"), event("canary", verdict="advance"), event("promote")], NOBODY, "", ["done"] * 6),
    ],
)
def test_the_steps_of_a_release_stand_where_it_stands(
    events: list[view.Event], routing: dict[str, Any], at_work: str, states: list[str]
) -> None:
    told = view.release(events, routing, WEIGHTS, at_work)
    assert [step["name"] for step in told["steps"]] == ["deploy", "5%", "25%", "50%", "chaos", "promote"]
    assert [step["state"] for step in told["steps"]] == states
