"""The local platform: replicas are processes under supervisord, nginx routes to them, Prometheus finds them in a file.

What should be is kept in `platform.json`, the same document that the gateway reads at its start and gets over its
admin socket (`routed`: when the routing last changed):

    {"routing": {"champion": "4", "canary": null, "canary_weight": 0.0}, "routed": 1790000000.0,
     "deployments": {"4": {"workload": "ranker", "wanted": 2, "params": {"serve": {...}, "pools": {...}},
                           "replicas": [{"name": "ranker-4-1", "port": 18100, "serving": true, "pool": "cpu"}, ...]}},
     "pools": {"realtime": ["cpu", "gpu"], "batch": null, "prices": {...}, "low_rps": 100.0, ...}}

A replica is on record before its process starts and until it ended, so nothing that runs is ever forgotten; the gateway
gives it requests only while it is `serving`. A call that was killed half-way is mended by the next one. The record is
locked while it changes, not while replicas start or drain: a rollback never waits for a deployment.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slipway import artifacts, config
from slipway.errors import PlatformError
from slipway.params import Params, PoolParams, PoolsParams, Section, ServeParams
from slipway.platforms.base import Fault, Replica, Routing, Status
from slipway.platforms.local import gateway, processes, programs
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.supervisor import Program, Supervisor

_LOG_LINES = 15
_POLL_S = 0.05
_PROBE_TIMEOUT_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9_.]+")

_ONLY = "all"  # name of the pool where params give none
_WHEN_IDLE = ("chrt", "--idle", "0")  # batch replicas run on processor time that nobody else wants

Document = dict[str, Any]
Record = dict[str, Any]


class LocalPlatform:
    """Implements `slipway.platforms.base.Platform` on this machine; the stack must be up."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._layout = Layout(config.home())
        self._supervisor = Supervisor(self._layout)
        self._kinds = {kind.name: kind for kind in params.pools.kinds or (PoolParams(name=_ONLY),)}

    @property
    def gateway_url(self) -> str:
        """Base URL of the service."""
        return gateway.url(self._params)

    @property
    def inner_url(self) -> str:
        """The socket for slipway's own traffic."""
        return f"unix:{self._layout.inner_socket}"

    @property
    def prometheus_url(self) -> str:
        """Base URL of Prometheus."""
        return f"http://{programs.HOST}:{self._params.stack.prometheus_port}"

    def deploy(self, workload: str, version: str, replicas: int, timeout_s: float) -> None:
        """Bring up `replicas` of a version and wait until all are ready; on failure no new one stays behind.

        Raises:
            PlatformError: a replica did not become ready; says why, with the end of its log. Or another workload is
                served here: versions are told apart by number alone.
        """
        for name in (workload, version):
            if not _NAME.fullmatch(name):
                raise PlatformError(f"{name!r} cannot name a workload or version: letters, digits, _ and . only")
        self._bring_to(replicas, version, workload, timeout_s)

    def scale(self, version: str, replicas: int, timeout_s: float) -> None:
        """Give a version that serves another number of replicas: new ones are awaited, surplus ones drained.

        Raises:
            PlatformError: nothing of the version serves, or a new replica is not ready in time; then no new one stays.
        """
        self._as_deployed(version)._bring_to(replicas, version, None, timeout_s)

    def pools_in_use(self) -> Mapping[str, bool]:
        """Pools of realtime requests, and whether the rate asks for each or users are still on it.

        Raises:
            PlatformError: the gateway does not answer.
        """
        told = {pool["name"]: pool["wanted"] or pool["weight"] > 0 for pool in gateway.state(self._layout)["pools"]}
        return {name: told[name] for name in self._pools()["realtime"] if name in told}

    def let_sleep(self, version: str, pools: Collection[str], timeout_s: float) -> None:
        """Let exactly `pools` of a version that serves have no replicas: theirs are drained, all others awaited.

        Raises:
            PlatformError: nothing of the version serves, or a replica that woke is not ready in time; then none stays.
        """
        replicas = self.status().wanted.get(version, 1)
        self._as_deployed(version)._bring_to(replicas, version, None, timeout_s, pools)

    def _as_deployed(self, version: str) -> LocalPlatform:
        """The platform with the parameters that a version's replicas were started with, whatever the caller's are."""
        kept = self._load()["deployments"].get(version, {}).get("params", {})
        sections: dict[str, type[Section]] = {"serve": ServeParams, "pools": PoolsParams}
        read = {name: sections[name].model_validate(values) for name, values in kept.items()}
        return LocalPlatform(self._params.model_copy(update=read))

    def _bring_to(
        self,
        replicas: int,
        version: str,
        workload: str | None,
        timeout_s: float,
        asleep: Collection[str] | None = None,
    ) -> None:
        """Start and drain until `replicas` serve; without a workload only where some do already.

        With `asleep` those pools have none, and only new replicas are awaited: they may come because others fail. Until
        the new ones are ready, and if they fail, all stays as it is.
        """
        with self._changing() as document:
            deployments = document["deployments"]
            serves = any(replica["serving"] for replica in deployments.get(version, {}).get("replicas", []))
            if workload is None and not serves:
                raise PlatformError(f"version {version} does not serve: deploy it before you scale it")
            others = sorted({str(known["workload"]) for known in deployments.values()} - {workload})
            if workload is not None and others:
                raise PlatformError(
                    f"this service is that of workload {others[0]}, and a stack serves one: start another stack for "
                    f"{workload} (SLIPWAY_HOME, and ports of its own under `stack`), or `make clean`, which ends this "
                    "one with all its state"
                )
            deployment = deployments.setdefault(version, {"workload": workload, "replicas": []})
            name = workload or str(deployment["workload"])
            known = sorted(deployment["replicas"], key=lambda replica: not replica["serving"])
            wanted, missing = [], []
            for pool in self._kinds.values():
                count = 0 if pool.name in (asleep or ()) else pool.replicas or replicas
                members = [replica for replica in known if replica.get("pool", _ONLY) == pool.name][:count]
                wanted += members
                missing += [pool.name] * (count - len(members))
            surplus = [replica for replica in known if replica not in wanted]
            wanted += self._allot(document, name, version, missing)
            deployment["replicas"] = wanted + surplus
        try:
            self._start(name, version, wanted)
            self._await_ready([r for r in wanted if asleep is None or not r["serving"]], timeout_s)
            with self._changing() as document:
                self._change_over(document, version, wanted, surplus)
                params = self._params.model_dump(mode="json", include={"serve", "pools"})
                document["deployments"][version] |= {"wanted": replicas, "params": params}
                if workload is not None:
                    document["pools"] = self._pools()
        except BaseException:
            self._discard(version, [replica for replica in wanted if not replica["serving"]])
            raise
        self._discard(version, surplus)

    def _change_over(self, document: Document, version: str, wanted: list[Record], surplus: list[Record]) -> None:
        on_record = {r["name"]: r for r in document["deployments"].get(version, {}).get("replicas", [])}
        for name in (replica["name"] for replica in wanted):
            if name not in on_record:
                raise PlatformError(f"version {version} was removed while it was deployed")
            on_record[name]["serving"] = True
        for name in (replica["name"] for replica in surplus if replica["name"] in on_record):
            on_record[name]["serving"] = False

    def _discard(self, version: str, replicas: list[Record]) -> None:
        """End replicas that serve nobody, then strike them from the record."""
        if not replicas:
            return
        self._stop(replicas)
        names = {replica["name"] for replica in replicas}
        with self._changing() as document:
            deployment = document["deployments"].get(version, {"replicas": []})
            deployment["replicas"] = [r for r in deployment["replicas"] if r["name"] not in names]
            if not deployment["replicas"]:
                document["deployments"].pop(version, None)

    def remove(self, version: str) -> None:
        """Drain and end all replicas of a version; nothing to do is fine.

        Raises:
            PlatformError: the version is still routed to.
        """
        with self._changing() as document:
            if version in (document["routing"]["champion"], document["routing"]["canary"]):
                raise PlatformError(f"version {version} is routed to: route elsewhere before you remove it")
            replicas = document["deployments"].get(version, {}).get("replicas", [])
            for replica in replicas:
                replica["serving"] = False
        self._discard(version, replicas)

    def route(self, routing: Routing) -> None:
        """Put `routing` in force, at once and without a failed request.

        Raises:
            PlatformError: a version has no ready replica, or the gateway does not answer.
        """
        if routing.champion is not None and routing.champion == routing.canary:
            raise PlatformError(f"version {routing.champion} cannot be champion and canary at once")
        with self._changing() as document:
            # Only a version that gains traffic has to prove itself: to take it away must work in any state.
            before = document["routing"]
            for version in {routing.champion, routing.canary} - {None, before["champion"], before["canary"]}:
                self._refuse_unready(document, str(version))
            document["pools"] = self._pools()
            if before != (after := asdict(routing)):
                document["routing"], document["routed"] = after, time.time()

    def status(self) -> Status:
        """What runs now: the routing on record, and every replica with its readiness at this moment."""
        document = self._load()
        ports = [replica["port"] for d in document["deployments"].values() for replica in d["replicas"]]
        with ThreadPoolExecutor(max(len(ports), 1)) as pool:  # a stalled replica takes its time, so ask all at once
            ready = dict(zip(ports, pool.map(_ready, ports), strict=True))
        replicas = {
            version: tuple(
                Replica(r["name"], version, f"{programs.HOST}:{r['port']}", ready[r["port"]], r.get("pool", _ONLY))
                for r in deployment["replicas"]
            )
            for version, deployment in document["deployments"].items()
        }
        wanted = {version: d.get("wanted", len(d["replicas"])) for version, d in document["deployments"].items()}
        return Status(Routing(**document["routing"]), replicas, wanted)

    def inject(self, replica: Replica, fault: Fault) -> None:
        """Do `fault` to one replica."""
        process = self._supervisor.processes().get(replica.name)
        if process is None or not process.pid:
            raise PlatformError(f"replica {replica.name} does not run: nothing to {fault}")
        os.killpg(process.pid, signal.SIGKILL if fault is Fault.KILL else signal.SIGSTOP)

    def heal(self, replica: Replica) -> None:
        """End a stall; a replica that was killed is restarted by supervisord itself."""
        process = self._supervisor.processes().get(replica.name)
        if process is not None and process.pid:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)

    @contextmanager
    def _changing(self) -> Iterator[Document]:
        """Give the document to one caller at a time; what it changed is in force, then on record, when this returns."""
        if not self._layout.stack_file.exists():
            raise PlatformError(f"{self._layout.home}: no stack was started here; start it with `make up`")
        with (self._layout.run / "platform.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = self._load()
            yield document
            gateway.put(self._layout, document)
            self._save(document)

    def _pools(self) -> Mapping[str, Any]:
        """What the gateway has to know of the pools."""
        limits, kinds = self._params.pools, self._kinds.values()
        return {
            "realtime": [kind.name for kind in kinds if kind.requests == "realtime"],
            "batch": next((kind.name for kind in kinds if kind.requests == "batch"), None),
            "prices": {kind.name: kind.price_per_hour for kind in kinds},
            **limits.model_dump(include={"low_rps", "high_rps", "dwell_s"}),
        }

    def _load(self) -> Document:
        if not self._layout.platform_file.exists():
            return {"routing": asdict(Routing()), "deployments": {}}
        document: Document = artifacts.read_json(self._layout.platform_file)
        return document

    def _save(self, document: Document) -> None:
        artifacts.write_json(self._layout.platform_file, document)
        targets = [
            {
                "targets": [f"{programs.HOST}:{replica['port']}"],
                "labels": {"workload": deployment["workload"], "version": version, "replica": replica["name"]},
            }
            for version, deployment in document["deployments"].items()
            for replica in deployment["replicas"]
        ]
        artifacts.write_json(self._layout.targets, targets)

    def _allot(self, document: Document, workload: str, version: str, pools: list[str]) -> list[Record]:
        """Name a new replica in each of `pools` and give it a port that nobody uses."""
        known = [replica for deployment in document["deployments"].values() for replica in deployment["replicas"]]
        names, used = {replica["name"] for replica in known}, {replica["port"] for replica in known}
        used |= {port for key, port in self._params.stack.model_dump().items() if key != "replica_port"}
        ports = (p for p in range(self._params.stack.replica_port, 65536) if p not in used and processes.is_free(p))
        fresh = (name for n in itertools.count(1) if (name := f"{workload}-{version}-{n}") not in names)
        return [{"name": next(fresh), "port": next(ports), "serving": False, "pool": pool} for pool in pools]

    def _start(self, workload: str, version: str, replicas: list[Record]) -> None:
        stack, model = artifacts.read_json(self._layout.stack_file), ("--model", f"{workload}/{version}")
        for replica in replicas:
            pool = self._kinds.get(replica.get("pool", _ONLY), PoolParams(name=_ONLY))
            before = _WHEN_IDLE if pool.requests == "batch" else ()
            program = Program(
                name=replica["name"],
                command=[*before, stack["python"], "-m", "slipway.serving", *model, "--port", str(replica["port"])],
                folder=Path(stack["checkout"]),
                environment=self._environment(pool),
                start_at_once=True,
                stop_wait_s=self._params.serve.drain_s + 2,
            )
            file = self._layout.replicas / f"{replica['name']}.conf"
            if not file.exists():
                self._layout.log(replica["name"]).unlink(missing_ok=True)
                artifacts.write_text(file, program.section(self._layout))
        self._supervisor.reload()
        for replica in replicas:
            self._supervisor.start(replica["name"])

    def _environment(self, pool: PoolParams) -> Mapping[str, str]:
        own = {key: value for key in ("engine", "threads", "max_batch") if (value := getattr(pool, key)) is not None}
        serve = self._params.serve.model_copy(update=own)
        return {
            "SLIPWAY_HOME": str(self._layout.home),
            "SLIPWAY_LOG_FORMAT": "json",
            "SLIPWAY_SERVE": serve.model_dump_json(),
            "SLIPWAY_REDIS": str(self._layout.redis_socket),
            "SLIPWAY_CACHE": ",".join(map(str, self._layout.cache_sockets(self._params.serve.cache))),
            "SLIPWAY_STATE": str(self._layout.state_socket),
            "SLIPWAY_EVENTS": str(self._layout.events),
            "OMP_NUM_THREADS": str(serve.threads),
            **({} if pool.devices is None else {"CUDA_VISIBLE_DEVICES": pool.devices}),
        }

    def _await_ready(self, replicas: list[Record], timeout_s: float) -> None:
        """Wait until all replicas are ready; a new one that ends meanwhile is not going to be."""
        deadline = time.monotonic() + timeout_s
        first = {name: process.pid for name, process in self._supervisor.processes().items()}
        waiting = list(replicas)
        while waiting := [replica for replica in waiting if not _ready(replica["port"])]:
            now = self._supervisor.processes()
            for name in (replica["name"] for replica in waiting if not replica["serving"]):
                if not now[name].alive or now[name].pid != first[name]:
                    raise PlatformError(f"replica {name} ended before it was ready:\n{self._log_end(name)}")
            if time.monotonic() > deadline:
                name = waiting[0]["name"]
                raise PlatformError(f"replica {name} not ready after {timeout_s:g} s:\n{self._log_end(name)}")
            time.sleep(_POLL_S)

    def _log_end(self, program: str) -> str:
        return processes.log_end(self._layout.log(program), _LOG_LINES)

    def _stop(self, replicas: list[Record]) -> None:
        """End replicas, all at once: each finishes what it has begun."""
        names = [replica["name"] for replica in replicas]
        if not names:
            return
        for name, process in self._supervisor.processes().items():
            if name in names and process.pid:
                with suppress(ProcessLookupError):  # a stalled replica could not hear the request to stop
                    os.killpg(process.pid, signal.SIGCONT)
        self._supervisor.stop(names, self._params.serve.drain_s + 10)
        for name in names:
            (self._layout.replicas / f"{name}.conf").unlink(missing_ok=True)
        self._supervisor.reload()

    def _refuse_unready(self, document: Document, version: str) -> None:
        replicas = document["deployments"].get(version, {}).get("replicas", [])
        if not any(replica["serving"] for replica in replicas):
            raise PlatformError(f"version {version} is not deployed: deploy it before you route to it")
        if not any(_ready(replica["port"]) for replica in replicas):
            raise PlatformError(f"version {version} has no ready replica: users cannot be routed to it")


def _ready(port: int) -> bool:
    return programs.answers(f"http://{programs.HOST}:{port}/v2/health/ready", _PROBE_TIMEOUT_S)
