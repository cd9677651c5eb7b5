"""The stack as a whole: up, down, status, power cuts, ports that are taken."""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipway import artifacts
from slipway.errors import StackError
from slipway.platforms.base import Routing
from slipway.platforms.local import airflow, gateway, processes, programs, stack
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.platform import LocalPlatform
from slipway.platforms.local.supervisor import Supervisor, configuration
from tests.conftest import ROOT, free_port, needs, until
from tests.platforms import stand

pytestmark = needs("nginx", "redis-server", "prometheus")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    stack.down()


def silent(_: str) -> None:
    pass


def members(home: Path) -> list[str]:
    """Command lines of all processes that this home's stack could have begun."""
    lines = []
    for pid in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()):
        line = processes.command_line(pid)
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if str(home) in line or f"={home}\0".encode() in environment:
            lines.append(f"{pid} {line}")
    return [line for line in lines if not line.startswith(f"{os.getpid()} ")]


@pytest.mark.slow
def test_a_power_cut_loses_neither_replicas_nor_routing_and_down_leaves_nothing(home: Path) -> None:
    params = stand.params()
    stack.up(params, stand.SERVICE, silent)
    platform = LocalPlatform(params)
    stand.publish("1")
    platform.deploy("ranker", "1", 2, timeout_s=60)
    platform.route(Routing("1"))

    for pid in processes.own(home, stack.session(Layout(home))):
        os.kill(pid, signal.SIGKILL)
    stack.up(params, stand.SERVICE, silent)
    assert platform.status().routing == Routing("1")
    assert gateway.state(Layout(home))["champion"] == "1"
    assert [replica.ready for replica in platform.status().replicas["1"]] == [True, True]

    os.kill(stack.session(Layout(home)).leader, signal.SIGKILL)  # type: ignore[union-attr]  # it is up
    stack.up(params, ["redis"], silent)  # what the killed supervisord left is ended first
    assert len([line for line in members(home) if "redis-server" in line]) == 1

    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=home)
    try:
        stack.down()
        assert bystander.poll() is None
        assert [line for line in members(home) if str(bystander.pid) not in line] == []
        assert not list((home / "run").glob("*.sock"))
    finally:
        bystander.kill()
        bystander.wait()


def test_a_second_up_changes_nothing_and_only_this_user_reaches_the_orders(home: Path) -> None:
    params = stand.params()
    stack.up(params, ["redis", "gateway"], silent)
    before = {row.name: row.pid for row in stack.status(params)}
    stack.up(params, ["redis", "gateway"], silent)
    assert {row.name: row.pid for row in stack.status(params)} == before
    assert all(row.well for row in stack.status(params))

    admin = home / "run" / "gateway.sock"
    assert admin.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == (home / "run").stat().st_mode & 0o777 == 0o700
    for port in (params.stack.gateway_port, params.stack.metrics_port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"PUT /state HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
            assert client.recv(64).startswith(b"HTTP/1.1 404")
    stopped = stack.down()
    assert stopped == 0, "what supervisord ended in good order left orphans"
    assert [row.well for row in stack.status(params)] == [False, False]


def test_a_program_that_was_killed_is_started_anew_at_once(home: Path) -> None:
    stack.up(stand.params(), ["redis"], silent)
    leader = stack.session(Layout(home)).leader  # type: ignore[union-attr]  # it is up
    children, waits = Path(f"/proc/{leader}/task/{leader}/children"), []
    for _ in range(3):
        time.sleep(1.2)  # what ends sooner waits before it is tried again
        killed = children.read_text().split()
        began = time.monotonic()
        os.kill(int(killed[0]), signal.SIGKILL)
        while children.read_text().split() in ([], killed):
            time.sleep(0.005)
        waits.append(time.monotonic() - began)
    assert min(waits) < 0.5, "supervisord's own loop takes a second"


def test_what_is_started_in_the_midst_of_a_stop_is_stopped_too(home: Path) -> None:
    """As an autoscaler does with replicas of a version that is just removed."""
    stack.up(stand.params(), ["redis", "state"], silent)
    supervisor = Supervisor(Layout(home))
    slow = supervisor.processes()["state"].pid
    os.kill(slow, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as thread:
        stopping = thread.submit(Supervisor(Layout(home)).stop, ["redis", "state"], 30.0)
        until(lambda: not supervisor.processes()["redis"].alive)
        supervisor.start("redis")
        os.kill(slow, signal.SIGCONT)
        stopping.result()
    assert not any(process.alive for process in supervisor.processes().values())


def test_without_a_version_the_gateway_says_so(home: Path) -> None:
    params = stand.params()
    stack.up(params, ["gateway"], silent)
    with socket.create_connection(("127.0.0.1", params.stack.gateway_port)) as client:
        client.sendall(b"POST /v1/recommend HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
        answer = client.makefile("rb").read()
    assert b" 503 " in answer
    assert b"no version is served yet" in answer


def test_a_killed_gateway_comes_back_by_itself(home: Path) -> None:
    params = stand.params()
    stack.up(params, ["gateway"], silent)
    (master,) = [row.pid for row in stack.status(params)]
    os.kill(master, signal.SIGKILL)  # its workers must not keep the port, nor its socket the path
    deadline = time.monotonic() + 15
    while [row.pid for row in stack.status(params)] in ([master], [0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    stack.up(params, ["gateway"], silent)
    assert gateway.state(Layout(home))["champion"] is None


def test_a_port_in_use_is_named_with_its_holder_and_its_key(home: Path) -> None:
    params = stand.params()
    with socket.create_server(("127.0.0.1", params.stack.gateway_port)), pytest.raises(StackError) as caught:
        stack.up(params, ["gateway"], silent)
    message = str(caught.value)
    assert f"port {params.stack.gateway_port} is held by pid {os.getpid()} (" in message
    assert "stack.gateway_port in params.yaml" in message
    assert members(home) == []


def test_a_home_with_a_long_path_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / ("x" * 100)))
    with pytest.raises(StackError, match="bytes too long for the unix sockets"):
        stack.up(stand.params(), ["redis"], silent)


def test_an_unknown_program_is_named_with_those_there_are(home: Path) -> None:
    with pytest.raises(StackError, match="no program nginx; there are: redis, state, gateway"):
        stack.up(stand.params(), ["nginx"], silent)


def test_the_command_ends_with_2_and_one_line_when_a_port_is_taken(home: Path, tmp_path: Path) -> None:
    params = stand.params()
    file = stand.write_params(tmp_path / "params.yaml", params)
    command = [sys.executable, "-m", "slipway.platforms.local", "--params", str(file), "up", "--only", "prometheus"]
    with socket.create_server(("127.0.0.1", params.stack.prometheus_port)):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert "stack.prometheus_port" in done.stderr


@needs("promtool")
def test_the_rendered_configurations_are_valid(home: Path) -> None:
    params = stand.params()
    stack.up(params, ["redis"], silent)
    nginx = ["nginx", "-t", "-q", "-p", f"{home}/gateway/", "-c", f"{home}/gateway/nginx.conf", "-e", "stderr"]
    for command in (
        nginx,
        ["promtool", "check", "config", f"{home}/prometheus/prometheus.yml"],
        ["amtool", "check-config", f"{home}/alertmanager/alertmanager.yml"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    files = [home / "gateway" / "nginx.conf", home / "prometheus" / "prometheus.yml"]
    before = [file.read_text() for file in files]
    stack.status(stand.params())  # of other ports: who only looks changes nothing
    assert [file.read_text() for file in files] == before


def test_a_process_has_ended_though_its_parent_has_not_taken_note() -> None:
    began = time.monotonic()
    with subprocess.Popen(["true"]) as ended:
        processes.await_end(ended.pid, 60.0)
        assert Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    assert time.monotonic() - began < 30
    processes.await_end(ended.pid, 60.0)  # which is long gone


def test_a_session_of_an_earlier_boot_or_leader_holds_none_of_ours(home: Path) -> None:
    now = processes.Session.of(os.getpid())
    assert now.may_hold_members()
    assert not processes.Session(now.leader, now.start_time + 1, now.boot).may_hold_members()
    assert not processes.Session(now.leader, now.start_time, "another boot").may_hold_members()


def test_every_program_of_the_stack_listens_on_the_loopback_interface_alone(home: Path) -> None:
    layout = Layout(home)
    layout.make()
    services = programs.all_of(layout, ROOT, sys.executable, stand.params())
    assert list(services) == [
        "redis",
        "state",
        "gateway",
        "prometheus",
        "alertmanager",
        "mlflow",
        "page",
        "autoscaler",
        *airflow.NAMES,
    ]
    assert {s.address.partition(":18")[0].rpartition(":")[0] for s in services.values()} >= {"http://127.0.0.1"}
    text = configuration(layout, [service.program for service in services.values()])
    assert "0.0.0.0" not in text
    assert "--cluster.listen-address= " in f"{text} ".replace("\n", " ")
    assert "AIRFLOW__API__HOST='127.0.0.1'" in text


def test_page_and_autoscaler_start_anew_when_their_code_changed_not_when_python_compiled_it(
    home: Path, tmp_path: Path
) -> None:
    layout, checkout = Layout(home), tmp_path / "checkout"
    layout.make()
    for part in ("infra", "slipway"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    params = stand.params()

    def sections() -> list[str]:
        services = programs.all_of(layout, checkout, sys.executable, params)
        return [services[name].program.section(layout) for name in ("page", "autoscaler")]

    before = sections()
    compileall.compile_dir(checkout / "slipway" / "monitor", quiet=1)
    assert sections() == before
    with (checkout / "slipway" / "prometheus.py").open("a") as module:  # both import it
        module.write("# more\n")
    assert all(section != then for section, then in zip(sections(), before, strict=True))


def test_airflow_gets_one_generated_password_that_only_its_owner_reads(tmp_path: Path) -> None:
    airflow.make_password(tmp_path)
    file = airflow.password_file(tmp_path)
    first = artifacts.read_json(file)
    airflow.make_password(tmp_path)
    assert artifacts.read_json(file) == first
    assert len(first[airflow.USER]) >= 16
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_free_port_is_free_and_a_held_one_is_not() -> None:
    port = free_port()
    assert processes.is_free(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not processes.is_free(port)


def test_what_the_gateway_restores_is_what_was_on_record(home: Path) -> None:
    params = stand.params()
    document = {"routing": {"champion": "3", "canary": "4", "canary_weight": 0.5}, "deployments": {}}
    Layout(home).make()
    artifacts.write_json(home / "platform.json", document)
    stack.up(params, ["gateway"], silent)
    state = gateway.state(Layout(home))
    assert (state["champion"], state["canary"], state["canary_weight"]) == ("3", "4", 0.5)
