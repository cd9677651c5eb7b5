"""A model server as a real process, and the clients that talk to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, free_port
from tests.serving import packages

PARAMS = {"max_batch": 8, "max_body_bytes": 65_536, "drain_s": 5.0}


@dataclass(frozen=True)
class Reply:
    """An answer: status, headers with lower-case names, body as it came and as JSON."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Replica:
    """One server process."""

    def __init__(
        self, folder: Path, log: Path, version: str = "7", options: Sequence[str] = (), **environment: str
    ) -> None:
        self.port = free_port()
        self._log = log
        given = {"SLIPWAY_SERVE": json.dumps(PARAMS), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, *options, "-W", "error", "-m", "slipway.serving", "--package", str(folder)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--version", version, "--port", str(self.port)],
                cwd=ROOT,
                env={**{k: v for k, v in os.environ.items() if not k.startswith("SLIPWAY_")}, **given},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def call(
        self,
        method: str,
        path: str,
        body: bytes | Any = None,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, named, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.call("GET", path)

    def post(self, path: str, body: bytes | Any) -> Reply:
        return self.call("POST", path, body)

    def metric(self, series: str) -> float:
        """Value of one series, such as slipway_ready; 0 if it is not there yet."""
        for line in self.get("/metrics").body.decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        return 0.0

    def wait_until_ready(self) -> None:
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(OSError):
                if self.get("/v2/health/ready").status == 200:
                    return
            time.sleep(0.05)
        pytest.fail(f"the replica did not become ready: {self.log}")

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


Start = Callable[..., Replica]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packages.seal(tmp_path_factory.mktemp("packages") / "ranker")


@pytest.fixture(scope="session")
def replica(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A ready replica without Redis, shared by all tests that leave it as it is."""
    running = Replica(package, tmp_path_factory.mktemp("replica") / "log")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture
def start(package: Path, tmp_path: Path) -> Iterator[Start]:
    """Start replicas of one's own: start(folder=..., SLIPWAY_REDIS=...)."""
    running: list[Replica] = []

    def start_one(folder: Path = package, **environment: str) -> Replica:
        running.append(Replica(folder, tmp_path / f"log{len(running)}", **environment))
        return running[-1]

    yield start_one
    for one in running:
        one.close()
