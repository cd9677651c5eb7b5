"""Pools that sleep: what is decided, and one real stack, from a pool asleep to all users on it and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from slipway import config, loopback
from slipway.errors import PlatformError
from slipway.params import PoolParams, PoolsParams
from slipway.platforms.base import Fault, Platform, Replica, Routing, Status
from slipway.platforms.local import gateway, programs
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.supervisor import Supervisor
from slipway.release.replay import Replay
from slipway.scaling.pools import UNUSED_S, Pools
from tests.conftest import ROOT, needs, until
from tests.platforms import stand
from tests.platforms.stand import Here

BOTH = {"cpu", "gpu"}


@dataclass
class Service:
    """A platform of two pools that only notes who is awake."""

    routing: Routing = field(default_factory=lambda: Routing("1"))
    awake: set[str] = field(default_factory=lambda: set(BOTH))
    in_use: set[str] = field(default_factory=lambda: {"cpu"})
    dead: set[str] = field(default_factory=set)
    refuses: bool = False
    silent: bool = False
    now_s: float = 1000.0

    def pools_in_use(self) -> Mapping[str, bool]:
        if self.silent:
            raise PlatformError("the gateway is silent")
        return {pool: pool in self.in_use for pool in sorted(BOTH)}

    def status(self) -> Status:
        replicas = tuple(Replica(pool, "1", "", pool not in self.dead, pool) for pool in sorted(self.awake))
        return Status(self.routing, {"1": replicas, "2": (Replica("2", "2", "", True, "cpu"),)})

    def let_sleep(self, version: str, pools: Collection[str], timeout_s: float) -> None:
        assert version == "1"
        if self.refuses:
            raise PlatformError("not ready")
        self.awake = BOTH - set(pools)

    def pools(self) -> Pools:
        return Pools(cast(Platform, self), 60.0, lambda: self.now_s)


def look(pools: Pools, service: Service, after_s: float = 0.0) -> set[str]:
    service.now_s += after_s
    pools.look()
    return service.awake


def test_a_pool_falls_asleep_when_it_was_not_needed_for_a_while_and_wakes_at_once() -> None:
    service = Service()
    pools = service.pools()
    assert look(pools, service) == BOTH, "what was before is not known"
    assert look(pools, service, UNUSED_S - 1) == BOTH
    assert look(pools, service, 1) == {"cpu"}
    service.in_use = BOTH
    assert look(pools, service, 1) == BOTH
    service.in_use = {"gpu"}
    assert look(pools, service, UNUSED_S - 1) == BOTH
    assert look(pools, service, 1) == {"gpu"}


def test_the_time_in_which_the_gateway_was_away_does_not_count_as_unused() -> None:
    service = Service()
    pools = service.pools()
    look(pools, service)
    service.silent = True
    with pytest.raises(PlatformError, match="silent"):
        look(pools, service, 1)
    service.silent = False
    assert look(pools, service, UNUSED_S) == BOTH
    assert look(pools, service, UNUSED_S) == {"cpu"}


def test_beside_a_canary_none_falls_asleep_yet_one_wakes() -> None:
    service = Service(Routing("1", "2", 0.1))
    pools = service.pools()
    look(pools, service)
    assert look(pools, service, 100) == BOTH
    service.awake, service.in_use = {"cpu"}, BOTH
    assert look(pools, service, 1) == BOTH
    service.routing, service.in_use = Routing("1"), {"cpu"}
    assert look(pools, service, 100) == {"cpu"}


def test_where_the_needed_pool_is_dead_the_other_one_wakes_and_stays_for_a_while() -> None:
    service = Service(awake={"gpu"}, in_use={"gpu"})
    pools = service.pools()
    assert look(pools, service, 100) == {"gpu"}
    service.dead = {"gpu"}
    assert look(pools, service, 1) == BOTH
    service.dead = set()
    assert look(pools, service, 1) == BOTH
    assert look(pools, service, UNUSED_S) == {"gpu"}


def test_a_pool_that_does_not_wake_is_tried_again_and_who_serves_otherwise_is_left_alone() -> None:
    service = Service(awake={"cpu"}, in_use=set(BOTH), refuses=True)
    pools = service.pools()
    with pytest.raises(PlatformError, match="not ready"):
        pools.look()
    service.refuses = False
    assert look(pools, service, 1) == BOTH
    for alone in (Service(Routing()), Service(awake=set()), Service(awake={"all"})):
        alone.refuses = True  # it would raise
        assert alone.pools().look() == 0


KINDS = (PoolParams(name="small", replicas=1, price_per_hour=0.1), PoolParams(name="large", replicas=2))


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A version in two pools, with the autoscaler; from 30 requests/s on the large one serves."""
    limits = PoolsParams(kinds=KINDS, low_rps=15, high_rps=30, dwell_s=1)
    chosen = stand.params().model_copy(update={"pools": limits})
    with stand.running(tmp_path_factory.mktemp("home"), chosen, ["redis", "gateway", "autoscaler"]) as up:
        stand.publish("1")
        up.platform.deploy("ranker", "1", 1, timeout_s=60)
        up.platform.route(Routing("1"))
        yield up


def pools_now(here: Here) -> dict[str, Any]:
    return {pool["name"]: pool for pool in gateway.state(Layout(here.home))["pools"]}


def awake(here: Here) -> set[str]:
    return {replica.pool for replica in here.platform.status().replicas["1"]}


def processes(here: Here) -> int:
    return sum(name.startswith("ranker-") for name in Supervisor(Layout(here.home)).processes())


def load(here: Here, rate: float) -> Replay:
    return Replay(here.platform.gateway_url, "/v1/recommend", stand.samples(), rate)


@needs("nginx", "redis-server")
@pytest.mark.slow
def test_users_never_notice_that_pools_sleep_and_wake(pooled: Here) -> None:
    until(lambda: awake(pooled) == {"small"})
    until(lambda: processes(pooled) == 1)
    small = pools_now(pooled)["small"]
    assert (small["weight"], small["ready"]) == (1, 1)
    with load(pooled, 60) as busy:
        until(lambda: pools_now(pooled)["large"]["wanted"])
        while not pools_now(pooled)["large"]["weight"]:  # who moves finds both awake
            assert "small" in awake(pooled)
        assert awake(pooled) == {"small", "large"}
        until(lambda: pools_now(pooled)["large"]["weight"] == 1)
        until(lambda: awake(pooled) == {"large"})
        until(lambda: processes(pooled) == 2)
    with load(pooled, 5) as calm:
        until(lambda: awake(pooled) == {"small"})
        until(lambda: processes(pooled) == 1)
        assert pools_now(pooled)["small"]["weight"] == 1
    for traffic in (busy, calm):
        figures = traffic.figures()
        assert (figures.failed, figures.requests > 0) == (0, True)


@needs("nginx", "redis-server")
@pytest.mark.slow
def test_a_pool_that_cannot_wake_leaves_users_where_they_are_until_it_can(pooled: Here) -> None:
    until(lambda: awake(pooled) == {"small"})
    manifest = config.home() / "models" / "ranker" / "1" / "package" / "items.json"
    sealed = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    log = Layout(pooled.home).log("autoscaler")
    with load(pooled, 60) as traffic:
        until(lambda: "no decision: replica ranker-1-" in log.read_text())
        now = pools_now(pooled)
        assert (now["large"]["wanted"], now["large"]["weight"], now["small"]["weight"]) == (True, 0, 1)
        assert "slipway_autoscaler_failures_total 0.0" not in metrics(pooled)
        manifest.write_bytes(sealed)
        until(lambda: pools_now(pooled)["large"]["weight"] == 1)
    assert traffic.figures().failed == 0


@needs("nginx", "redis-server")
@pytest.mark.slow
def test_a_release_finds_all_pools_awake_and_a_dead_pool_the_other_one(pooled: Here) -> None:
    until(lambda: awake(pooled) == {"small"})
    stand.publish("2")
    pooled.platform.deploy("ranker", "2", 1, timeout_s=60)
    pooled.platform.route(Routing("1", "2", 0.5))
    assert len(pooled.platform.status().replicas["2"]) == 3
    with load(pooled, 60) as traffic:
        until(lambda: awake(pooled) == {"small", "large"})
        pooled.platform.route(Routing("2"))
        pooled.platform.remove("1")
        until(lambda: {r.pool for r in pooled.platform.status().replicas["2"]} == {"large"})
    assert traffic.figures().failed == 0
    until(lambda: {r.pool for r in pooled.platform.status().replicas["2"]} == {"small"})
    pooled.platform.inject(pooled.platform.status().replicas["2"][0], Fault.STALL)
    until(lambda: {r.pool for r in pooled.platform.status().replicas["2"] if r.ready} == {"large"})
    stalled = next(r for r in pooled.platform.status().replicas["2"] if r.pool == "small")
    pooled.platform.heal(stalled)
    until(lambda: {r.pool for r in pooled.platform.status().replicas["2"]} == {"small"})


def metrics(here: Here) -> str:
    with loopback.urlopen(f"http://127.0.0.1:{here.params.stack.autoscaler_port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@needs("nginx", "redis-server", "prometheus")
@pytest.mark.parametrize(
    ("kinds", "autoscaling", "runs"),
    [
        (KINDS, "infra/kubernetes/hpa.yaml", True),
        (KINDS, None, False),
        (KINDS[:1], "infra/kubernetes/hpa.yaml", False),
        ((KINDS[0], PoolParams(name="night", requests="batch")), "infra/kubernetes/hpa.yaml", False),
    ],
)
def test_an_autoscaler_runs_where_a_pool_may_sleep(
    tmp_path: Path, kinds: tuple[PoolParams, ...], autoscaling: str | None, runs: bool
) -> None:
    chosen = stand.params()
    deploy = chosen.deploy.model_copy(update={"autoscaling": autoscaling})
    chosen = chosen.model_copy(update={"pools": PoolsParams(kinds=kinds), "deploy": deploy})
    layout = Layout(tmp_path)
    layout.make()
    assert ("autoscaler" in programs.all_of(layout, ROOT, "python", chosen)) is runs
