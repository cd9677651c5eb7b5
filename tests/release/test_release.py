"""Whole releases on a real service: nginx, Redis, Prometheus, model servers, a registry, and users who notice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slipway import artifacts, store, tracking
from slipway.errors import (
    CanaryRejectedError,
    ChaosError,
    DataError,
    ParamsError,
    PlatformError,
    RegistryError,
    TransientError,
)
from slipway.faults.experiment import experiment
from slipway.params import ChaosParams
from slipway.platforms.base import Fault, Platform, Replica, Routing
from slipway.platforms.local import stack
from slipway.release import history
from slipway.release.replay import Replay
from tests.conftest import free_port, needs, until
from tests.release import candidates
from tests.release.service import WORKLOAD, Service, service

pytestmark = [
    needs("nginx", "redis-server", "prometheus"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
    pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),  # MLflow's engines end with the process
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STEPS = ("deploy", "canary", "chaos", "promote")


@dataclass(frozen=True)
class World:
    """A service, and the versions that its registry holds."""

    service: Service
    versions: dict[str, str]

    @property
    def routing(self) -> Routing:
        return self.service.platform.status().routing

    def rewind(self, champion: str | None) -> None:
        """Let `champion` serve alone, as if nothing else had ever been released."""
        platform = self.service.platform
        if champion is not None:
            platform.deploy(WORKLOAD, champion, 2, timeout_s=60)
        platform.route(Routing(champion))
        for version in platform.status().replicas:
            if version != champion:
                platform.remove(version)
        history.path().unlink(missing_ok=True)
        history.name_versions(WORKLOAD, champion, None)
        tracking.set_alias(WORKLOAD, "candidate", None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with service(tmp_path_factory.mktemp("release")) as running:
        makers: dict[str, Callable[[Path], Path]] = {
            "one": candidates.good,
            "two": lambda folder: candidates.good(folder, scale=1.1),
            "useless": candidates.useless,
            "failing": candidates.failing,
            "slow": candidates.slow,
        }
        yield World(running, {name: running.register(name, make) for name, make in makers.items()})


@pytest.fixture
def one(world: World) -> World:
    """Version one is the champion."""
    world.rewind(world.versions["one"])
    return world


def ready(platform: Platform, version: str) -> list[Replica]:
    return [replica for replica in platform.status().replicas[version] if replica.ready]


def nobody_noticed(traffic: Replay) -> None:
    failed = [answer for answer in traffic.answers if answer.failed]
    assert not failed, failed[:3]
    assert traffic.figures().requests > 0


def test_a_first_release_gets_all_users_and_is_judged_by_the_slo_alone(world: World) -> None:
    world.rewind(None)
    version = world.versions["one"]
    world.service.step("deploy", version=version)
    assert world.routing == Routing(None, version, 1.0)
    with world.service.load(30) as users:
        report = world.service.step("canary")
        world.service.step("promote")
    nobody_noticed(users)
    assert [step["weight"] for step in report["steps"]] == [1.0]
    assert report["steps"][0]["champion"] is None
    assert world.routing == Routing(champion=version)
    assert tracking.aliases(WORKLOAD)["champion"] == version
    assert tracking.alias(WORKLOAD, "previous") is None


def test_a_second_good_release_replaces_the_first_and_no_request_fails(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    tracking.set_alias(WORKLOAD, "candidate", second)
    with one.service.load(50) as users:
        reports = {step: one.service.step(step) for step in STEPS}
    nobody_noticed(users)
    assert [step["weight"] for step in reports["canary"]["steps"]] == [0.2, 0.5]
    assert all(step["verdict"] == "advance" for step in reports["canary"]["steps"])
    assert all(step[track]["requests"] > 0 for step in reports["canary"]["steps"] for track in ("canary", "champion"))
    assert [e["fault"] for e in reports["chaos"]["experiments"]] == ["kill", "stall"]
    assert reports["promote"]["replaced"] == first
    assert one.routing == Routing(champion=second)
    assert set(one.service.platform.status().replicas) == {second}, "the replaced version was drained"
    assert tracking.aliases(WORKLOAD) == {"champion": second, "previous": first}
    assert {answer.version for answer in users.answers} == {first, second}

    # The previous one was drained, so a rollback brings it up first; and a second rollback has nothing to do.
    with one.service.load(30) as users:
        report = one.service.step("rollback")
    nobody_noticed(users)
    assert (report["replaced"], report["champion"]) == (second, first)
    assert one.routing == Routing(champion=first)
    assert tracking.aliases(WORKLOAD) == {"champion": first}
    assert one.service.step("rollback")["replaced"] is None
    assert one.routing == Routing(champion=first)


@pytest.mark.parametrize(
    ("name", "reason"), [("useless", "online metric"), ("failing", "failed attempts"), ("slow", "P99|failed attempts")]
)
def test_a_bad_candidate_is_rolled_back_and_no_user_notices(one: World, name: str, reason: str) -> None:
    champion, version = one.versions["one"], one.versions[name]
    tracking.set_alias(WORKLOAD, "candidate", version)
    with one.service.load(30) as users:
        one.service.step("deploy", version=version)
        with pytest.raises(CanaryRejectedError, match=reason):
            one.service.step("canary")
        assert one.routing == Routing(champion, version, 0.0), "the canary itself gave the users back"
        zero_s = users.now_s()
        assert one.service.step("rollback", only_canary=True)["canary"] == version
    nobody_noticed(users)
    report = one.service.report("canary")
    print({key: value for key, value in report.items() if key.startswith("seconds")})
    assert report["status"] == "failed"
    assert report["steps"][-1]["verdict"] == "rollback"
    assert report["reasons"] == report["steps"][-1]["reasons"]
    assert report["replayed"]["failed"] == 0 < report["replayed"]["requests"]
    assert report["seconds_verdict_to_zero_traffic"] < 5
    assert report["seconds_first_bad_to_zero_traffic"] > 0
    assert not [a for a in users.answers if a.due_s > zero_s and a.track == "canary"]
    assert tracking.alias(WORKLOAD, "candidate") is None, "the next release would try the refused version again"
    assert one.routing == Routing(champion=champion)
    assert set(one.service.platform.status().replicas) == {champion}


def test_chaos_fails_when_users_notice(one: World) -> None:
    """One replica and nobody behind it: its kill cannot be hidden."""
    one.rewind(None)
    params = one.service.params.model_copy(
        update={"deploy": one.service.params.deploy.model_copy(update={"replicas": 1})}
    )
    one.service.step("deploy", params, version=one.versions["two"])
    with pytest.raises(ChaosError, match="users noticed kill"):
        one.service.step("chaos", params)
    (finding,) = one.service.report("chaos")["experiments"]
    assert finding["figures"]["failed"] > 0
    assert [e["event"] for e in history.events(WORKLOAD)] == ["deploy", "chaos"]


def test_an_interrupted_stall_is_healed(one: World) -> None:
    platform, limits = one.service.platform, ChaosParams(duration_s=60.0)
    (target, _) = platform.status().replicas[one.versions["one"]]

    def interrupt() -> None:
        until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)  # before, it would end the tests
        until(lambda: len(ready(platform, target.version)) < 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with one.service.load(20) as users, pytest.raises(KeyboardInterrupt):
        experiment(platform, target, Fault.STALL, users, limits)
    until(lambda: len(ready(platform, target.version)) == 2, seconds=60)  # nobody else heals it
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_rollback_needs_no_mlflow_and_takes_a_moment_while_the_previous_one_is_warm(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    one.service.platform.deploy(WORKLOAD, second, 1, timeout_s=60)
    history.append("promote", WORKLOAD, second, replaced=first)
    one.service.platform.route(Routing(champion=second))
    with one.service.load(30) as users:
        done = one.service.command("tasks.rollback", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    nobody_noticed(users)
    assert done.returncode == 0, done.stderr
    assert one.routing == Routing(champion=first)
    assert "the aliases in the registry stay behind" in done.stderr
    report = one.service.report("rollback")
    assert (report["replaced"], report["aliases"]) == (second, False)
    assert report["seconds_to_route"] < 5
    last = history.events(WORKLOAD)[-1]
    assert (last["event"], last["version"], last["rolled_back"]) == ("rollback", first, second)
    # MLflow is back: a second call has nothing to do but to let the aliases follow.
    assert one.service.step("rollback")["replaced"] is None
    assert one.routing == Routing(champion=first)
    assert tracking.aliases(WORKLOAD) == {"champion": first}


def test_a_rollback_goes_to_a_version_that_is_named(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    with pytest.raises(RegistryError, match="999"):
        one.service.step("rollback", to="999")
    assert one.routing == Routing(champion=first)
    with pytest.raises(ParamsError, match="either to, .* or only_canary"):
        one.service.step("rollback", to=second, only_canary=True)
    assert one.service.step("rollback", to=second)["champion"] == second
    assert one.routing == Routing(champion=second)
    assert set(one.service.platform.status().replicas) == {second}
    assert tracking.aliases(WORKLOAD)["champion"] == second


def test_a_rollback_by_hand_ends_a_canary_that_runs(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    one.service.step("deploy", version=second)
    canary = one.service.params.canary.model_copy(update={"interval_s": 120.0})
    long, ends = one.service.params.model_copy(update={"canary": canary}), list[BaseException]()

    def climb() -> None:
        try:
            one.service.step("canary", long)
        except CanaryRejectedError as error:
            ends.append(error)

    thread = threading.Thread(target=climb)
    thread.start()
    until(lambda: one.routing.canary_weight > 0)
    with pytest.raises(TransientError, match="another release is at work"):
        one.service.step("deploy", version=second)
    assert one.service.step("rollback")["canary"] == second
    thread.join()
    assert "the traffic was moved meanwhile" in str(ends[0])
    assert one.routing == Routing(champion=first)
    assert set(one.service.platform.status().replicas) == {first}


def test_a_canary_that_was_killed_goes_on_from_the_weight_in_force(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    one.service.step("deploy", version=second)
    one.service.platform.route(Routing(first, second, 0.5))
    assert [step["weight"] for step in one.service.step("canary")["steps"]] == [0.5]


def test_a_promotion_that_was_killed_before_the_aliases_moved_ends_right(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    one.service.step("deploy", version=second)
    history.append("promote", WORKLOAD, second, replaced=first)
    one.service.platform.route(Routing(champion=second))
    assert tracking.aliases(WORKLOAD)["champion"] == first
    for _ in range(2):
        assert one.service.step("promote")["replaced"] == first
        assert tracking.alias(WORKLOAD, "champion") == second
        assert tracking.alias(WORKLOAD, "previous") == first
        assert set(one.service.platform.status().replicas) == {second}


@pytest.mark.parametrize("told_to_end", [False, True])
def test_a_promotion_that_fails_for_good_leaves_nobody_on_the_canary(one: World, told_to_end: bool) -> None:
    first, second = one.versions["one"], one.versions["two"]
    one.service.step("deploy", version=second)
    one.service.platform.route(Routing(first, second, 0.5))
    gateway = next(row.pid for row in stack.status(one.service.params) if row.name == "gateway")

    def last(event: str) -> bool:
        return bool(history.events(WORKLOAD)[-1]["event"] == event)

    def heal() -> None:
        if told_to_end:
            until(lambda: last("promote"))  # it is under way, for as long as the gateway is silent
            until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)  # else it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: last("rollback"))  # it is known not to have happened
        os.killpg(gateway, signal.SIGCONT)

    healer = threading.Thread(target=heal)
    os.killpg(gateway, signal.SIGSTOP)
    healer.start()
    with pytest.raises(KeyboardInterrupt if told_to_end else PlatformError, match="SIGTERM|the gateway is silent"):
        one.service.step("promote")
    healer.join()
    assert one.routing == Routing(champion=first)
    with one.service.load(30) as users:
        until(lambda: len(users.answers) > 20)
    nobody_noticed(users)
    assert {answer.version for answer in users.answers} == {first}
    assert set(one.service.platform.status().replicas) == {first}
    assert history.previous(WORKLOAD) is None
    with pytest.raises(PlatformError, match=f"version {second} is not in the service"):
        one.service.step("promote")
    assert one.routing == Routing(champion=first)


def test_what_is_the_champion_already_is_released_again_without_a_change(one: World) -> None:
    version = one.versions["one"]
    one.service.step("deploy", version=version)
    assert one.service.step("canary")["skipped"]
    assert one.service.step("chaos")["skipped"]
    one.service.step("promote")
    assert one.routing == Routing(champion=version)
    assert one.service.step("rollback", only_canary=True)["canary"] is None
    assert one.routing == Routing(champion=version)


def test_a_second_release_is_refused_while_a_canary_is_out(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    one.service.step("deploy", version=second)
    with pytest.raises(PlatformError, match=f"version {second} is a canary at weight 0: .* `python -m tasks.rollback`"):
        one.service.step("deploy", version=one.versions["useless"])
    one.service.step("rollback", only_canary=True)
    assert one.routing == Routing(first, second, 0.0), "the refused release must not end the other one"
    with pytest.raises(DataError, match="this deploy failed"):
        one.service.step("canary")


def test_a_candidate_takes_over_as_many_replicas_as_the_load_gave_the_champion(one: World) -> None:
    first, second = one.versions["one"], one.versions["two"]
    one.service.platform.scale(first, 3, timeout_s=60)
    policy = one.service.params
    fixed = policy.model_copy(update={"deploy": policy.deploy.model_copy(update={"autoscaling": None})})
    for params, replicas in ((policy, 3), (fixed, 2)):
        one.service.step("deploy", params, version=second)
        assert one.service.platform.status().wanted == {first: 3, second: replicas}
        one.service.step("rollback", only_canary=True)
        one.service.platform.remove(second)


def test_a_version_that_fails_its_trial_is_removed_again(one: World) -> None:
    """Its first samples hold items that break it."""
    version = one.versions["failing"]
    folder = tracking.fetch(WORKLOAD, version)
    whole = (folder / "replay.jsonl").read_text()
    manifest = artifacts.read_json(folder / "version.json")

    def record(replay: str) -> None:
        artifacts.write_json(folder / "version.json", {**manifest, "replay": replay})
        store.client().set_model_version_tag(WORKLOAD, version, "replay", replay)

    try:
        artifacts.write_text(folder / "replay.jsonl", "".join(reversed(whole.splitlines(keepends=True))))
        record(artifacts.sha256(folder / "replay.jsonl"))
        with pytest.raises(PlatformError, match="smoke request .* got 500"):
            one.service.step("deploy", version=version)
    finally:
        artifacts.write_text(folder / "replay.jsonl", whole)
        record(manifest["replay"])
    assert set(one.service.platform.status().replicas) == {one.versions["one"]}
    assert one.routing == Routing(champion=one.versions["one"])
