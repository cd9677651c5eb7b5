"""docs/metrics.md against what gateway and replicas really tell."""

from __future__ import annotations

import json
import re
import urllib.request

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from slipway import loopback
from slipway.platforms.base import Routing
from slipway.platforms.local import stack
from tests.conftest import ROOT, needs, until
from tests.platforms import stand
from tests.platforms.stand import Here

DOCS = (ROOT / "docs" / "metrics.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| ([^|]+) \|([^|]*)\| [^|]+ \|$", re.MULTILINE)

pytestmark = needs("nginx", "redis-server", "prometheus")


def families(url: str) -> list[Metric]:
    with loopback.urlopen(url, timeout=10) as answer:
        return list(text_string_to_metric_families(answer.read().decode()))


def told(url: str) -> dict[str, tuple[str, frozenset[str]]]:
    """What a process tells: type and labels of each metric."""
    found = {}
    for family in families(url):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, frozenset(labels))
    return found


def documented(chapter: str) -> dict[str, tuple[str, frozenset[str]]]:
    text = DOCS.split(f"\n## {chapter}\n")[1].split("\n## ")[0]
    return {
        name: (kind, frozenset(labels.replace(" ", "").split(",")) - {""})
        for name, kind, _, labels in ROW.findall(text)
    }


def ask(here: Here, count: int = 1) -> None:
    for sample in stand.samples(count):
        body = json.dumps(sample["request"]).encode()
        with urllib.request.urlopen(f"{here.platform.gateway_url}/v1/recommend", body) as answer:
            request_id = json.load(answer)["request_id"]
    feedback = json.dumps({"request_id": request_id, "item": "item1"}).encode()
    urllib.request.urlopen(f"{here.platform.gateway_url}/v1/feedback", feedback).close()


@pytest.fixture(scope="module")
def served(here: Here) -> Here:
    for version in ("1", "2"):
        stand.publish(version)
        here.platform.deploy("ranker", version, 1, timeout_s=60)
    here.platform.route(Routing("1", "2", 0.5))
    ask(here, 20)
    return here


def test_the_page_of_metrics_tells_what_the_gateway_tells(served: Here) -> None:
    assert told(f"http://127.0.0.1:{served.params.stack.metrics_port}/metrics") == documented("Gateway")


def test_the_page_of_metrics_tells_what_a_replica_tells(served: Here) -> None:
    (replica,) = served.platform.status().replicas["1"]
    assert told(f"http://{replica.address}/metrics") == documented("Replica")


def test_the_page_of_metrics_tells_what_the_stack_tells(served: Here) -> None:
    stack.up(served.params, ["page"], tell=lambda _: None)
    url = f"http://127.0.0.1:{served.params.stack.page_port}/metrics"
    until(lambda: "program" in told(url)["slipway_program_memory_bytes"][1])
    assert told(url) == documented("Stack")


def test_the_page_of_metrics_tells_what_the_autoscaler_tells(served: Here) -> None:
    stack.up(served.params, ["autoscaler"], tell=lambda _: None)
    url = f"http://127.0.0.1:{served.params.stack.autoscaler_port}/metrics"
    until(lambda: "version" in told(url)["slipway_autoscaler_replicas"][1])
    until(lambda: "metric" in told(url)["slipway_autoscaler_metric_ratio"][1])
    assert told(url) == documented("Autoscaler")


def test_every_metric_ends_with_its_unit_and_there_are_enough() -> None:
    rows = ROW.findall(DOCS)
    assert len(rows) >= 25
    assert len({name for name, *_ in rows}) == len(rows)
    for name, kind, unit, _ in rows:
        assert (kind == "counter") == name.endswith("_total"), name
        for short, long in (("s", "_seconds"), ("bytes", "_bytes")):
            assert (unit == short) == (long in name.removesuffix("_total") + "$"), f"{name}: {unit}"


def test_the_series_of_a_version_that_is_gone_are_dropped(served: Here) -> None:
    def versions() -> set[str]:
        url = f"http://127.0.0.1:{served.params.stack.metrics_port}/metrics"
        samples = (sample for family in families(url) for sample in family.samples)
        return {sample.labels["version"] for sample in samples if "version" in sample.labels}

    stand.publish("3")
    served.platform.deploy("ranker", "3", 1, timeout_s=60)
    served.platform.route(Routing("1", "3", 0.5))
    assert versions() == {"1", "2", "3"}
    served.platform.remove("2")
    assert versions() == {"1", "3"}
