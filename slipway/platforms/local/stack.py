"""The local stack as a whole: up, down, status. Every call is idempotent: what runs stays, what is gone is gone."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from slipway import artifacts
from slipway.errors import DataError, StackError
from slipway.params import Params
from slipway.platforms.local import airflow, processes, programs, system
from slipway.platforms.local.layout import Layout, here
from slipway.platforms.local.processes import Session
from slipway.platforms.local.programs import Service
from slipway.platforms.local.supervisor import Process, Supervisor, configuration

CHECKOUT = Path(__file__).parents[3]
_PORT_S = 3.0  # a process that was killed holds its port until the kernel has taken its memory apart
_SUPERVISOR_START_S = 20.0
_STOP_S = 45.0
_REPLICA_START_S = 60.0
_POLL_S = 0.1
_LOG_LINES = 20

Tell = Callable[[str], None]


def up(params: Params, only: Sequence[str] = (), tell: Tell = print) -> None:
    """Start the programs of the stack (all, or `only` some) and wait until each is well.

    Raises:
        StackError: a program is missing, a port is taken, or a program did not become well (with the end of its log).
    """
    layout = here()
    layout.make()
    with _alone(layout):
        system.require()
        services = programs.all_of(layout, CHECKOUT, sys.executable, params)
        wanted = _select(services, only)
        for path, text in (file for service in services.values() for file in service.files.items()):
            artifacts.write_text(path, text)
        text = configuration(layout, [service.program for service in services.values()])
        artifacts.write_text(layout.home / "supervisor" / "supervisord.conf", text)
        supervisor = Supervisor(layout)
        if supervisor.answers():
            supervisor.reload()
        else:
            end_orphans(layout)
            _refuse_taken_ports(wanted)
            _start_supervisor(layout, supervisor)
        known = supervisor.processes()
        fresh = [service for service in wanted if not known[service.name].alive]
        _refuse_taken_ports(fresh)
        _record(layout, supervisor, wanted)
        _start(layout, supervisor, wanted, fresh, tell)
        _await_replicas(layout, tell)


def _select(services: dict[str, Service], only: Sequence[str]) -> list[Service]:
    if unknown := sorted(set(only) - services.keys()):
        raise StackError(f"no program {', '.join(unknown)}; there are: {', '.join(services)}")
    return [service for name, service in services.items() if not only or name in only]


def end_orphans(layout: Layout) -> int:
    """End what a supervisord that was killed left behind, and clear its socket."""
    count = processes.end(layout.home, session(layout), grace_s=10.0)
    for left in layout.run.glob("*.sock"):
        left.unlink(missing_ok=True)
    return count


def _refuse_taken_ports(services: Sequence[Service]) -> None:
    ports = [(service.name, key, port) for service in services for key, port in service.ports.items()]
    deadline = time.monotonic() + _PORT_S
    while taken := [each for each in ports if not processes.is_free(each[2])]:
        if time.monotonic() > deadline:
            raise StackError(
                "\n".join(
                    f"{name}: port {port} is held by {processes.holder(port)}; end that, or change {key} in params.yaml"
                    for name, key, port in taken
                )
            )
        time.sleep(0.1)


def _start_supervisor(layout: Layout, supervisor: Supervisor) -> None:
    """Start supervisord, which leaves this session and stays."""
    own = {"SLIPWAY_HOME": str(layout.home), processes.MARK: str(layout.home)}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', programs.PATH)}"
    own |= {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}  # all of it talks over loopback
    foreign = ("AIRFLOW__", "SLIPWAY_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    conf = layout.home / "supervisor" / "supervisord.conf"
    # Without -P the modules beside it would come before supervisor's own.
    command = [sys.executable, "-P", str(Path(__file__).with_name("keeper.py")), "-c", str(conf)]
    started = subprocess.run(
        command,
        env=inherited | own,
        cwd=layout.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    deadline = time.monotonic() + _SUPERVISOR_START_S
    while not supervisor.answers():
        if started.returncode or time.monotonic() > deadline:
            end = processes.log_end(layout.log("supervisord"), _LOG_LINES)
            raise StackError(f"supervisord did not start: {started.stderr.strip() or started.stdout.strip()}\n{end}")
        time.sleep(0.05)


def _record(layout: Layout, supervisor: Supervisor, wanted: Sequence[Service]) -> None:
    before = artifacts.read_json(layout.stack_file)["programs"] if layout.stack_file.exists() else []
    names = [*before, *(service.name for service in wanted if service.name not in before)]
    leader = asdict(Session.of(supervisor.pid()))
    value = {"checkout": CHECKOUT, "python": sys.executable, "session": leader, "programs": names}
    artifacts.write_json(layout.stack_file, value)


def _start(
    layout: Layout, supervisor: Supervisor, wanted: Sequence[Service], fresh: Sequence[Service], tell: Tell
) -> None:
    """Start programs, all at once, and wait until they are well; Airflow's as soon as its database is ready."""
    began = time.monotonic()
    late = [service for service in wanted if service.late]
    of_airflow = [service for service in wanted if service.name in airflow.NAMES and service not in late]
    others = [service for service in wanted if service not in (*of_airflow, *late)]
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(_start_airflow, layout, supervisor, [s for s in of_airflow if s in fresh])
        for service in (service for service in others if service in fresh):
            supervisor.start(service.name)
        _await_health(layout, supervisor, others, began, tell)
        started.result()
        _await_health(layout, supervisor, of_airflow, began, tell)
    for service in (service for service in late if service in fresh):
        supervisor.start(service.name)
        tell(f"{service.name:<18} started")


def _start_airflow(layout: Layout, supervisor: Supervisor, fresh: Sequence[Service]) -> None:
    if not fresh:
        return
    folder = layout.folder("airflow")
    airflow.make_password(folder)
    airflow.migrate(folder, sys.executable, fresh[0].program.environment, layout.log("airflow-migrate"))
    for service in fresh:
        supervisor.start(service.name)


def _await_health(layout: Layout, supervisor: Supervisor, wanted: Sequence[Service], began: float, tell: Tell) -> None:
    waiting = list(wanted)
    while waiting:
        known = supervisor.processes()
        for service in list(waiting):
            seconds = time.monotonic() - began
            process = known[service.name]
            if process.alive and service.healthy():
                waiting.remove(service)
                tell(f"{service.name:<18} ready  {seconds:5.1f} s  {service.address}".rstrip())
            elif not process.alive or seconds > service.start_s:
                what = "ended" if not process.alive else f"is not well after {service.start_s:.0f} s"
                log = layout.log(service.name)
                raise StackError(f"{service.name} {what}; the end of {log}:\n{processes.log_end(log, _LOG_LINES)}")
        time.sleep(_POLL_S)


def _await_replicas(layout: Layout, tell: Tell) -> None:
    """Wait for the replicas on record, which start with supervisord; a broken one must not keep the rest from use."""
    waiting = _replicas(layout)
    deadline = time.monotonic() + _REPLICA_START_S
    while waiting := {n: url for n, url in waiting.items() if not programs.answers(f"{url}/v2/health/ready")}:
        if time.monotonic() > deadline:
            for name in waiting:
                tell(f"{name:<18} NOT READY; the end of {layout.log(name)}:\n{processes.log_end(layout.log(name), 5)}")
            return
        time.sleep(_POLL_S)


def _replicas(layout: Layout) -> dict[str, str]:
    """Name and URL of every replica on record."""
    if not layout.platform_file.exists():
        return {}
    deployments = artifacts.read_json(layout.platform_file)["deployments"].values()
    return {r["name"]: f"http://{programs.HOST}:{r['port']}" for d in deployments for r in d["replicas"]}


def down() -> int:
    """End every process that `up` began, replicas and orphans too, and nothing else; how many had to be hunted."""
    layout = here()
    if not layout.home.exists():
        return 0
    layout.make()
    with _alone(layout):
        supervisor = Supervisor(layout)
        if supervisor.answers():
            for pid in processes.own(layout.home, session(layout)):
                with suppress(ProcessLookupError):  # a stalled process could not hear the request to stop
                    os.kill(pid, signal.SIGCONT)
            leader = supervisor.pid()
            supervisor.stop(list(supervisor.processes()), _STOP_S)
            supervisor.shutdown()
            processes.await_end(leader, 10.0)
        return end_orphans(layout)


@dataclass(frozen=True)
class Row:
    """One line of the status."""

    name: str
    state: str
    pid: int
    uptime_s: float
    address: str

    @property
    def well(self) -> bool:
        """It runs; supervisord says STARTING in its first second."""
        return self.state in {"STARTING", "RUNNING"}


def status(params: Params) -> list[Row]:
    """Tell of every program that `up` was asked for, and of every replica."""
    layout = here()
    if not layout.stack_file.exists():
        return []
    stack = artifacts.read_json(layout.stack_file)
    services = programs.all_of(layout, Path(stack["checkout"]), stack["python"], params)
    addresses = {name: services[name].address for name in stack["programs"]} | _replicas(layout)
    supervisor = Supervisor(layout)
    known = supervisor.processes() if supervisor.answers() else {}
    nobody = Process("", "DOWN", 0, 0)
    rows = []
    for name, address in addresses.items():
        process = known.get(name, nobody)
        uptime = time.time() - process.started if process.pid else 0.0
        rows.append(Row(name, process.state, process.pid, uptime, address))
    return rows


def session(layout: Layout) -> Session | None:
    """Read which session supervisord opened when `up` last found or started it."""
    try:
        return Session(**artifacts.read_json(layout.stack_file)["session"])
    except DataError:
        return None


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """One `up` or `down` at a time."""
    with (layout.run / "stack.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
