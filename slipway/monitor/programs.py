"""What the local stack tells Prometheus of its own programs: whether each is well, and what it uses of the machine.

Redis, MLflow and Airflow have no numbers of their own; this asks each what `make up` asks it, in a thread, so that a
scrape never waits for a program that hangs.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from slipway import artifacts
from slipway.errors import SlipwayError
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.programs import Service
from slipway.platforms.local.supervisor import Supervisor

EVERY_S = 2.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Use:
    """What a program and the processes under it use."""

    processor_s: float = 0.0
    memory_bytes: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(self.processor_s + other.processor_s, self.memory_bytes + other.memory_bytes)


class Programs(Collector):
    """Looks at every program that `up` was asked for, each `EVERY_S` seconds.

    Args:
        layout: of the state folder.
        services: all programs that there may be, by name; `own` is left out.
        own: the program that this runs in.
    """

    def __init__(self, layout: Layout, services: Mapping[str, Service], own: str) -> None:
        self._layout, self._own = layout, own
        self._services = services
        self._supervisor = Supervisor(layout)
        self._up: dict[str, bool] = {}
        self._used: dict[str, Use] = {}
        threading.Thread(target=self._watch, name="programs", daemon=True).start()

    def collect(self) -> Iterable[Metric]:
        """Tell what was seen last."""
        up = GaugeMetricFamily("slipway_program_up", "1: the program of the stack is well.", labels=["program"])
        processor = CounterMetricFamily(
            "slipway_program_processor_seconds",
            "Processor time of a program, with the processes under it.",
            None,
            ["program"],
        )
        memory = GaugeMetricFamily(
            "slipway_program_memory_bytes", "Memory of a program and all under it.", labels=["program"]
        )
        for name, well in list(self._up.items()):
            up.add_metric([name], float(well))
        for name, use in list(self._used.items()):
            processor.add_metric([name], use.processor_s)
            memory.add_metric([name], use.memory_bytes)
        available = GaugeMetricFamily(
            "slipway_host_memory_available_bytes", "Memory of the machine that programs could still get.", _available()
        )
        load = GaugeMetricFamily(
            "slipway_host_load_ratio", "Processes that want a processor (mean of a minute), per processor.", _load()
        )
        return [up, processor, memory, available, load]

    def look(self) -> None:
        """Ask every program once."""
        names = [name for name in artifacts.read_json(self._layout.stack_file)["programs"] if name != self._own]
        processes = self._supervisor.processes()
        known = [self._services[name] for name in names if name in self._services]
        with ThreadPoolExecutor(max(1, len(known))) as pool:
            well = list(pool.map(lambda service: processes[service.name].alive and service.healthy(), known))
        self._up = {service.name: each for service, each in zip(known, well, strict=True)}
        pids = {processes[service.name].pid: service.name for service in known if processes[service.name].pid}
        self._used = use(pids)

    def _watch(self) -> None:
        rest = threading.Event()
        while True:
            try:
                self.look()
            except (SlipwayError, OSError, KeyError):  # the stack is going up or down: what runs is told next time
                self._up = dict.fromkeys(self._up, False)
            rest.wait(EVERY_S)


def use(roots: Mapping[int, str]) -> dict[str, Use]:
    """What the trees of processes under `roots` use, by the root's name."""
    parents, each = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            pid = int(folder.name)
            parents[pid] = int(fields[1])
            each[pid] = Use((int(fields[11]) + int(fields[12])) / _TICKS, int(fields[21]) * _PAGE_BYTES)
    total: dict[str, Use] = defaultdict(Use)
    for pid, used in each.items():
        above: int | None = pid
        while above is not None and above not in roots:
            above = parents.get(above)
        if above is not None:
            total[roots[above]] += used
    return dict(total)


def _available() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0.0


def _load() -> float:
    return os.getloadavg()[0] / (os.cpu_count() or 1)
