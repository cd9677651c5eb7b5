"""Nodes meet, agree, fail and end together; two of two processes end as one machine of four, whatever is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from slipway.errors import DivergedError, SlipwayError, TransientError
from slipway.params import TrainParams
from slipway.training import loop, rendezvous, survey
from slipway.training.rendezvous import Link, Node, Team
from tests.conftest import ROOT, free_port, until
from tests.ranker import data
from tests.training.test_loop import job

WORLD = 4


def test_the_variables_of_torchrun_or_of_kubeflow_tell_the_node() -> None:
    told = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rendezvous.here(told) == Node(1, 2, "10.0.0.1", 29500)
    assert rendezvous.here({f"PET_{name}": value for name, value in told.items()}) == Node(1, 2, "10.0.0.1", 29500)
    assert rendezvous.here({}) == rendezvous.here(told | {"NNODES": "1"}) == Node()


@pytest.mark.parametrize(
    ("turned", "message"),
    [
        ({"NODE_RANK": ""}, "NODE_RANK="),
        ({"NNODES": "1:2"}, "NNODES=1:2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR="),
        ({"NODE_RANK": "2"}, "NODE_RANK=2, but of NNODES=2 the last is 1"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536, but"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "once on each node"),
    ],
)
def test_variables_that_are_wrong_are_named(turned: dict[str, str], message: str) -> None:
    told = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(SlipwayError, match=message):
        rendezvous.here(told | turned)


def test_processes_are_divided_evenly_or_refused() -> None:
    assert [Node(i, 2).ranks(WORLD) for i in range(2)] == [range(2), range(2, 4)]
    for world_size in (1, 5):
        with pytest.raises(SlipwayError, match=rf"train\.world_size: {world_size} .* set a multiple of 2"):
            Node(0, 2).ranks(world_size)


def test_the_memory_plan_counts_the_memory_of_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainParams(world_size=WORLD)
    one = survey.machine(train)
    for name, value in {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    two = survey.machine(train)
    assert two.host == 2 * (one.host or 0)
    assert two.device == (2 if two.shared else 1) * (one.device or 0), "a GPU has its own"


@dataclass(frozen=True)
class Meet:
    """Nodes of this machine, each in a thread."""

    port: int
    threads: ThreadPoolExecutor

    def __call__(
        self, rank: int, act: Callable[[Team], Any] = lambda _: None, *, count: int = 2, wait_s: float = 60.0
    ) -> Future[Any]:
        """Be a node: meet the others, and do something with them."""

        def be() -> Any:
            with rendezvous.meet(Node(rank, count, "127.0.0.1", self.port), 12, wait_s) as team:
                return act(team)

        return self.threads.submit(be)


@pytest.fixture
def meet() -> Iterator[Meet]:
    with ThreadPoolExecutor(8) as threads:
        yield Meet(free_port(), threads)


def heard(team: Team, link: Link) -> Exception | None:
    wait([link])  # as processes.py does
    return team.hear(link)


def _well(team: Team) -> Any:
    """Agree, and end well."""
    agreed = team.agree(lambda: {"step": 7})
    if team.node.rank == 0:
        assert [heard(team, link) for link in team.links] == [None] * (team.node.count - 1)
    assert team.conclude() is None
    return agreed, team.meeting


def test_nodes_meet_agree_and_end_well_together(meet: Meet) -> None:
    nodes = [meet(rank, _well, count=3) for rank in (2, 0, 1)]
    agreed = [node.result() for node in nodes]
    assert agreed == [agreed[0]] * 3
    assert agreed[0][0] == {"step": 7}
    assert agreed[0][1].startswith("tcp://127.0.0.1:")


def test_listening_is_on_the_first_nodes_address_alone(meet: Meet) -> None:
    def act(team: Team) -> Any:
        assert team.interface == "lo"
        return team.store and team.store.getsockname()[0]

    nodes = [meet(rank, act) for rank in range(2)]
    assert [node.result() for node in nodes] == ["127.0.0.1", None]


def test_a_node_that_does_not_come_is_told_by_its_number_to_all_that_did(meet: Meet) -> None:
    nodes = [meet(rank, count=3, wait_s=1.0) for rank in (0, 2)]
    for node in nodes:
        with pytest.raises(TransientError, match="node 1 of 3 did not come to 127.0.0.1"):
            node.result()


def test_without_the_first_node_the_wait_is_bounded(meet: Meet) -> None:
    with pytest.raises(TransientError, match="node 0 does not answer at 127.0.0.1:"):
        meet(1, wait_s=1.0).result()


def test_whoever_else_listens_there_and_says_nothing_is_not_waited_for(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "LOST_S", 4)
    with socket.create_server(("127.0.0.1", meet.port)), pytest.raises(TransientError, match="says nothing"):
        meet(1, wait_s=0.1).result(timeout=30)


def test_nodes_that_were_told_differently_are_refused(meet: Meet) -> None:
    nodes = [meet(0, count=2), meet(1, count=3)]
    for node in nodes:
        with pytest.raises(SlipwayError, match="node 1 was started with NNODES=3, node 0 with NNODES=2"):
            node.result()


def test_two_nodes_of_one_number_are_refused(meet: Meet) -> None:
    nodes = [meet(rank, count=3) for rank in (0, 1, 1)]
    for node in nodes:
        with pytest.raises(SlipwayError, match="two nodes were started with NODE_RANK=1"):
            node.result()


def _framed(text: bytes) -> bytes:
    return struct.pack("!i", len(text)) + text


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        _framed(b'{"node": 1}'),
        _framed(b'{"node": 7, "NNODES": 2, "train.world_size": 12}'),
        _framed(b'{"node": 0, "NNODES": 2, "train.world_size": 12}'),
        _framed(b'{"node": 1e999, "NNODES": 2, "train.world_size": 12}'),
        _framed(b"[" * 10_000),
    ],
)
def test_who_is_no_launcher_is_left_standing(meet: Meet, said: bytes) -> None:
    def call() -> bool:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", meet.port), timeout=60) as caller:
            caller.sendall(said)
            with suppress(ConnectionResetError):  # it hangs up without having read all
                assert caller.recv(1) == b""
            return True
        return False

    first = meet(0, _well)
    until(call)
    assert meet(1, _well).result() == first.result()


def test_strangers_who_speak_slowly_keep_no_node_waiting(meet: Meet) -> None:
    done = threading.Event()

    def drip(ends: list[socket.socket]) -> None:
        while not done.wait(0.1):
            for end in ends:
                with suppress(OSError):  # it was left standing
                    end.send(_framed(b" " * 500)[:1])

    first = meet(0, _well)
    with ExitStack() as strangers:
        until(lambda: _called(meet.port, strangers))
        ends = [end for _ in range(2 * rendezvous.CALLERS) if (end := _called(meet.port, strangers))]
        dripping, began = meet.threads.submit(drip, ends), time.monotonic()
        try:
            assert meet(1, _well).result() == first.result()
            assert time.monotonic() - began < rendezvous.HELLO_S
        finally:
            done.set()
            dripping.result()


def _called(port: int, open_: ExitStack) -> socket.socket | None:
    with suppress(ConnectionRefusedError):
        return open_.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
    return None


def test_what_one_node_raises_all_raise(meet: Meet) -> None:
    def act(team: Team) -> None:
        if team.node.rank == 1:
            raise DivergedError("training: the loss is nan", step=5)
        raise heard(team, team.links[0]) or AssertionError("it said that all is well")

    for node in [meet(rank, act) for rank in range(2)]:
        with pytest.raises(DivergedError, match="the loss is nan") as raised:
            node.result()
        assert raised.value.step == 5


def test_all_raise_what_the_first_node_says_even_if_it_looked_otherwise_to_them(meet: Meet) -> None:
    def act(team: Team) -> None:
        if team.node.rank == 0:
            raise TransientError("training: rank 3 ended with SIGKILL")
        raise team.conclude(RuntimeError("connection reset by peer")) or AssertionError("it said that all is well")

    for node in [meet(rank, act) for rank in range(2)]:
        with pytest.raises(TransientError, match="rank 3 ended with SIGKILL"):
            node.result()


@pytest.mark.parametrize("stopped", [0, 1])
def test_that_a_node_was_interrupted_all_are_told(meet: Meet, stopped: int) -> None:
    def act(team: Team) -> None:
        if team.node.rank == stopped:
            raise KeyboardInterrupt
        if (told := heard(team, team.links[0])) is not None:
            raise told

    nodes = [meet(rank, act) for rank in range(2)]
    with pytest.raises(SlipwayError, match=f"node {stopped} was interrupted; start the stage on all nodes") as raised:
        nodes[1 - stopped].result()
    assert not isinstance(raised.value, TransientError), "they would start again and wait for it"
    with pytest.raises(KeyboardInterrupt):
        nodes[stopped].result()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_launcher_that_is_gone_is_told(meet: Meet, gone: int) -> None:
    def act(team: Team) -> Exception | None:
        if team.node.rank == gone:
            team.links[0].close()
            return None
        return heard(team, team.links[0])

    told = [meet(rank, act) for rank in range(2)][1 - gone].result()
    assert isinstance(told, TransientError)
    assert f"launcher of node {gone} is gone" in str(told)


def test_nodes_that_do_not_share_their_checkpoints_are_refused(meet: Meet, tmp_path: Path) -> None:
    def act(team: Team) -> Any:
        mine = job(tmp_path / str(team.node.rank), world_size=WORLD)
        mine.checkpoints.parent.mkdir(exist_ok=True)
        loop._begin(mine, 2, team)
        return heard(team, team.links[0])

    told, refused = (meet(rank, act) for rank in range(2))
    with pytest.raises(SlipwayError, match=r"node 1 does not see node 0's checkpoints .* set SLIPWAY_HOME"):
        refused.result()
    assert "node 1 does not see node 0's checkpoints" in str(told.result())


@dataclass
class Machine:
    """A node, as far as one machine can be two: a workspace with its own copy of the data, and the public command."""

    folder: Path
    home: Path

    def __post_init__(self) -> None:
        params = YAML(typ="safe").load(ROOT / "params.yaml")
        params["train"] |= {
            **{"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "world_size": WORLD},
            "checkpoint_every_s": 0.001,
        }
        params["ranker"] |= {"width": 16, "blocks": 1, "max_length": 8, "dropout": 0.2, "negatives": 16}
        data.write(self.folder / "data/ingest", data.steps(users=400, items=30))
        YAML().dump(params, self.folder / "params.yaml")

    def start(self, variables: Mapping[str, object] | None = None) -> subprocess.Popen[bytes]:
        """Start the stage on two cores, so that a process has one thread whether it is one of four or of two."""
        told = {name: str(value) for name, value in (variables or {}).items()}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tasks.train"],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "SLIPWAY_HOME": str(self.home), **told},
                stdout=log,
                stderr=log,
                preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]),
            )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def trained(self) -> tuple[bytes, list[tuple[float, float]]]:
        report = json.loads((self.folder / "reports/train.json").read_text())
        weights = (self.folder / "models/trained/weights.npz").read_bytes()
        return weights, [(point["loss"], point["metric"]) for point in report["curve"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = tmp_path_factory.mktemp("alone")
    machine = Machine(folder / "one", folder / "home")
    assert machine.start().wait() == 0, machine.log
    return machine


def _process(stage: int, name: str) -> int | None:
    """The rank `name` that a stage has started: its grandchild."""
    for found in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if parts := re.match(r"(\d+) \((.*)\) \S (\d+)", found.read_text()):
                parent = Path(f"/proc/{parts[3]}/stat").read_text().rsplit(") ", 1)[1].split()[1]
                if parts[2] == name and int(parent) == stage:
                    return int(parts[1])
    return None


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["nobody", "a process", "node 1", "node 0"])
def test_two_nodes_end_bit_for_bit_as_one_machine_whatever_is_killed(
    alone: Machine, tmp_path: Path, victim: str
) -> None:
    shared = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [Machine(tmp_path / str(rank), tmp_path / "home") for rank in range(2)]
    stages = [node.start({**shared, "NODE_RANK": rank}) for rank, node in enumerate(nodes)]
    try:
        if victim != "nobody":
            until(lambda: any((tmp_path / "home").glob("checkpoints/*/step-*")))
            one = 0 if victim == "node 0" else 1
            pid = _process(stages[one].pid, "slipway rank 3") if victim == "a process" else stages[one].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            if victim != "a process":
                stages[one].wait()
                stages[one] = nodes[one].start({**shared, "NODE_RANK": one})
        codes = [stage.wait() for stage in stages]
    finally:
        for stage in stages:
            stage.kill()
            stage.wait()
    assert codes == [0, 0], "\n".join(node.log for node in nodes)
    other = nodes[1 if victim == "node 0" else 0].log
    told = {"nobody": "", "a process": "rank 3 ended with SIGKILL"}.get(victim, f"the launcher of {victim} is gone")
    assert told in other
    assert ("starting again" in other) == (victim != "nobody")
    assert nodes[0].trained() == alone.trained()
    assert sorted(path.name for path in nodes[1].folder.iterdir()) == ["data", "log", "params.yaml"], (
        "a node but the first wrote"
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_when_the_first_node_is_interrupted_the_other_ends_at_once_and_says_why(tmp_path: Path, count: int) -> None:
    shared = {"NNODES": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [Machine(tmp_path / str(rank), tmp_path / "home") for rank in range(2)]
    stages = [node.start({**shared, "NODE_RANK": rank}) for rank, node in enumerate(nodes)]
    try:
        if count == 2:  # they train
            until(lambda: any((tmp_path / "home").glob("checkpoints/*/step-*")))
        else:
            until(lambda: "node 1 of 4 is there" in nodes[0].log)
        stages[0].send_signal(signal.SIGINT)
        codes = [stage.wait(60) for stage in stages]
    finally:
        for stage in stages:
            stage.kill()
            stage.wait()
    assert codes == [130, 2], "\n".join(node.log for node in nodes)
    assert "node 0 was interrupted; start the stage on all nodes again" in nodes[1].log
