"""The autoscaler: what it does and leaves alone, and one real stack, from slow users to replicas and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from slipway import loopback
from slipway.errors import ParamsError, PlatformError
from slipway.params import SloParams
from slipway.platforms.base import Platform, Replica, Routing, Status
from slipway.platforms.local import programs, stack
from slipway.platforms.local.layout import Layout
from slipway.prometheus import Prometheus, Sample
from slipway.release.replay import Replay
from slipway.scaling import policy
from slipway.scaling.autoscaler import Autoscaler
from tests.conftest import ROOT, needs, until
from tests.platforms import stand
from tests.platforms.stand import Here
from tests.scaling import policies

SHIPPED = ROOT / "infra" / "kubernetes" / "hpa.yaml"


@dataclass
class Service:
    """A platform that only counts, and its Prometheus."""

    routing: Routing = field(default_factory=lambda: Routing("1"))
    counts: dict[str, int] = field(default_factory=lambda: {"1": 2})
    busy: float = 0.7
    now_s: float = 1000.0
    refuses: bool = False

    def status(self) -> Status:
        replicas = {
            v: tuple(Replica(f"{v}-{n}", v, "", True) for n in range(count)) for v, count in self.counts.items()
        }
        return Status(self.routing, replicas, self.counts)

    def scale(self, version: str, replicas: int, timeout_s: float) -> None:
        if self.refuses:
            raise PlatformError("not ready")
        self.counts[version] = replicas

    def now(self, query: str) -> list[Sample]:
        if "track" in query:
            return [Sample("", {}, 0.0)]
        value = self.busy if "processor" in query else 0.0
        return [Sample("", {"replica": r.name}, value) for each in self.status().replicas.values() for r in each]

    def autoscaler(self) -> Autoscaler:
        platform, prometheus = cast(Platform, self), cast(Prometheus, self)
        return Autoscaler(policy.read(SHIPPED), platform, prometheus, 1, 60.0, lambda: self.now_s)


def looks(autoscaler: Autoscaler, service: Service, seconds: int) -> Sequence[dict[str, int]]:
    found = []
    for _ in range(seconds // 5):
        autoscaler.look()
        found.append(dict(service.counts))
        service.now_s += 5
    return found


def test_the_champion_follows_the_load_out_at_once_and_in_after_five_minutes() -> None:
    service = Service(busy=1.0)
    autoscaler = service.autoscaler()
    assert looks(autoscaler, service, 5)[-1] == {"1": 3}
    service.busy = 0.1
    assert looks(autoscaler, service, 295)[-1] == {"1": 3}
    assert looks(autoscaler, service, 300)[-1] == {"1": 2}


def test_a_canary_is_left_alone_and_the_champion_keeps_its_replicas_beside_it() -> None:
    service = Service(Routing("1", "2", 0.05), {"1": 4, "2": 4}, busy=0.1)
    autoscaler = service.autoscaler()
    assert looks(autoscaler, service, 900)[-1] == {"1": 4, "2": 4}
    service.busy = 1.0
    assert looks(autoscaler, service, 5)[-1] == {"1": 6, "2": 4}
    service.busy, service.routing = 0.1, Routing("1")
    assert looks(autoscaler, service, 900)[-1] == {"1": 2, "2": 4}


def test_a_new_champion_is_not_judged_by_what_the_old_one_needed() -> None:
    service = Service(counts={"1": 6, "2": 6}, busy=1.0)
    autoscaler = service.autoscaler()
    looks(autoscaler, service, 60)
    service.routing, service.busy = Routing("2"), 0.1
    assert looks(autoscaler, service, 295)[-1]["2"] == 6
    assert looks(autoscaler, service, 600)[-1]["2"] == 2


def test_where_nobody_serves_nothing_is_scaled_and_a_failure_is_tried_again() -> None:
    assert Service(Routing(), {}).autoscaler().look() is None
    service = Service(busy=1.0, refuses=True)
    autoscaler = service.autoscaler()
    with pytest.raises(PlatformError, match="not ready"):
        autoscaler.look()
    service.refuses = False
    autoscaler.look()
    assert service.counts == {"1": 3}


def test_a_policy_that_is_not_there_is_named_with_its_parameter() -> None:
    with pytest.raises(ParamsError, match=r"none\.yaml: cannot be read .*deploy\.autoscaling"):
        policy.read(Path("none.yaml"))


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A stack whose users were promised what no service can keep, a tenth of a millisecond."""
    chosen = stand.params()
    deploy = chosen.deploy.model_copy(update={"autoscaling": str(policies.quick(tmp_path_factory.mktemp("policy")))})
    chosen = chosen.model_copy(update={"deploy": deploy, "slo": SloParams(p99_ms=0.1)})
    with stand.running(tmp_path_factory.mktemp("home"), chosen, [*stand.SERVICE, "alertmanager", "autoscaler"]) as up:
        stand.publish("1")
        up.platform.deploy("ranker", "1", 1, timeout_s=60)
        up.platform.route(Routing("1"))
        yield up


def text_of(port: int) -> str:
    with loopback.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@needs("nginx", "redis-server", "prometheus")
@pytest.mark.slow
def test_slow_users_call_replicas_and_none_of_them_fails_while_they_come_and_go(impatient: Here) -> None:
    def wanted() -> int:
        return impatient.platform.status().wanted["1"]

    until(lambda: wanted() == 2)  # the policy's least
    with Replay(impatient.platform.gateway_url, "/v1/recommend", stand.samples(), 60) as load:
        until(lambda: re.search(r'notifications_total{integration="webhook".*} [1-9]', alertmanager(impatient)))
        # A fast model asks for none: neither the processors, nor the queue, nor 80 ms are reached.
        impatient.platform.scale("1", 4, timeout_s=60)
        until(lambda: wanted() == 2)
    assert load.figures().failed == 0
    until(lambda: len(impatient.platform.status().replicas["1"]) == 2)
    assert 'slipway_autoscaler_changes_total{direction="in"}' in text_of(impatient.params.stack.autoscaler_port)
    rows = {row.name: row for row in stack.status(impatient.params)}
    assert rows["autoscaler"].well


def alertmanager(here: Here) -> str:
    return text_of(here.params.stack.alertmanager_port)


@needs("nginx", "redis-server", "prometheus")
def test_without_a_policy_there_is_no_autoscaler(tmp_path: Path) -> None:
    chosen = stand.params()
    without = chosen.model_copy(update={"deploy": chosen.deploy.model_copy(update={"autoscaling": None})})
    layout = Layout(tmp_path)
    layout.make()
    hook = f"http://127.0.0.1:{chosen.stack.autoscaler_port}/alerts"
    follows, alone = (programs.all_of(layout, ROOT, "python", params) for params in (chosen, without))
    assert ("autoscaler" in follows, "autoscaler" in alone) == (True, False)
    assert [hook in "".join(each["alertmanager"].files.values()) for each in (follows, alone)] == [True, False]
    assert str(chosen.stack.autoscaler_port) not in "".join(alone["prometheus"].files.values())
