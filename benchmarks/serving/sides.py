"""The servers that are compared, each a process of its own with the same ONNX model and one engine thread.

Peers come from PyPI, pinned, each in an environment of its own under .slipway/peers; `install` makes them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load
from slipway import artifacts
from tests.conftest import ROOT, free_port

HOST = "127.0.0.1"
PEERS = ROOT / ".slipway" / "peers"
SCRIPTS = Path(__file__).parent / "peers"
PINS = {"mosec": "mosec==0.9.8", "LitServe": "litserve==0.2.19", "BentoML": "bentoml==1.4.40"}


@dataclass(frozen=True)
class Side:
    """One server."""

    name: str
    command: Sequence[str]
    """With {port} for its port."""
    serve: Mapping[str, Any] = field(default_factory=dict)
    """The section `serve`, of ours."""


def ours(folder: Path, name: str = "slipway", **serve: Any) -> Side:
    """Our replica of a package."""
    command = [sys.executable, "-m", "slipway.serving", "--package", str(folder), "--version", "1", "--port", "{port}"]
    return Side(name, command, serve)


def bare() -> Side:
    """The least that answers in Python."""
    return Side("slipway bare", [sys.executable, "-m", "benchmarks.serving.bare", "{port}"])


def peers() -> Iterator[Side]:
    """Those that are installed."""
    commands = {
        "mosec": ["python", str(SCRIPTS / "with_mosec.py"), "--address", HOST, "--port", "{port}"],
        "LitServe": ["python", str(SCRIPTS / "with_litserve.py"), "{port}"],
        "BentoML": ["python", "-m", "bentoml", "serve", "with_bentoml:Recommend", "--host", HOST, "--port", "{port}"],
    }
    for name, (program, *rest) in commands.items():
        place = PEERS / name.lower() / "bin"
        if place.exists():
            yield Side(name, [str(place / program), *rest])


def install() -> None:
    """Make the environments that are not there; needs PyPI."""
    for name, pin in PINS.items():
        place = PEERS / name.lower()
        if place.exists():
            continue
        try:
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            pip = [str(place / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, pin, "onnxruntime==1.32.0", "numpy"], check=True)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)  # half of it would count as installed
            raise


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    port: int
    pid: int

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return HOST, self.port

    def cpu_s(self) -> float:
        """Processor time that it and its children used so far."""
        return sum(_cpu_s(pid) for pid in _family(self.pid))

    def metrics(self) -> dict[str, float]:
        """Every series of ours with its value now."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=10) as answer:
            lines = (line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
            return {series: float(value) for series, value in lines}

    def batches(self) -> tuple[float, float]:
        """Samples and runs of the engine so far, of ours."""
        found = self.metrics()
        return found["slipway_batch_size_sum"], found["slipway_batch_size_count"]


@contextmanager
def running(side: Side, folder: Path, probe: bytes, core: int | None = None) -> Iterator[Running]:
    """Run a server on a free port, on one processor if told, until the block ends; it has answered `probe` with 200."""
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLIPWAY_", "PYTHON"))}
    environment |= {"OMP_NUM_THREADS": "1", "RANKER": str(folder), "SLIPWAY_LOG": "WARNING", "PYTHONPATH": str(ROOT)}
    environment |= {"SLIPWAY_SERVE": json.dumps(side.serve), "BENTOML_DO_NOT_TRACK": "1"}
    folder_of_it = ROOT if side.name.startswith("slipway") else SCRIPTS
    with Path(os.devnull).open("w") as nothing:
        process = subprocess.Popen(
            [part.format(port=port) for part in side.command],
            cwd=folder_of_it, env=environment, stdout=nothing, stderr=nothing,
        )  # fmt: skip
    if core is not None:
        os.sched_setaffinity(process.pid, {core})  # its threads, which are to come, inherit it
    try:
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            with suppress(OSError, TimeoutError):
                if set(load.closed_loop((HOST, port), [probe], 1, 0.01)) == {200}:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"{side.name}: does not answer")
        yield Running(port, process.pid)
    finally:
        family = _family(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait(15)


def requests(folder: Path, count: int = 500, wrapped: bool = False) -> list[bytes]:
    """Whole HTTP requests with histories of 5 to 50 items; `wrapped` as BentoML's batches want them."""
    keys = artifacts.read_json(folder / "items.json")["keys"]
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        history = [keys[i] for i in random.integers(0, len(keys), size=random.integers(5, 51))]
        body: Any = {"history": history, "k": 10}
        made.append(load.post("/v1/recommend", {"inputs": [body]} if wrapped else body))
    return made


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
