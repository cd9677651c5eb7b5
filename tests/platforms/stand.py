"""A local stack of a test's own: a temporary home, free ports, and tiny models where the registry's copies would be."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from slipway import artifacts, config
from slipway.params import Params, StackParams
from slipway.platforms.local import stack
from slipway.platforms.local.platform import LocalPlatform
from slipway.release.replay import Sample
from tests.conftest import ROOT, free_port
from tests.serving import packages

SERVICE = ("redis", "gateway", "prometheus")


def params() -> Params:
    """The parameters of the checkout, with ports that are free."""
    ports: set[int] = set()
    while len(ports) < len(StackParams.model_fields):
        ports.add(free_port())
    keys = StackParams(**dict(zip(StackParams.model_fields, sorted(ports), strict=True)))
    return config.load(ROOT / "params.yaml").model_copy(update={"stack": keys})


def write_params(path: Path, params: Params, **values: object) -> Path:
    """Write a params.yaml with the ports of `params` and other values by dotted key, for a command."""
    shutil.copyfile(ROOT / "params.yaml", path)
    config.override(path, {f"stack.{key}": port for key, port in params.stack.model_dump().items()} | values)
    return path


def samples(count: int = 200) -> list[Sample]:
    """Requests that every model of `publish` can answer, each by a user of its own."""
    return [
        {
            "user": f"u{n}",
            "request": {"user": f"u{n}", "history": [packages.key(n % 200 + 1), packages.key(n % 90 + 2)], "k": 5},
            "truth": packages.key(n % 150 + 3),
        }
        for n in range(count)
    ]


def publish(version: str, seed: int | None = None, package: Path | None = None) -> Path:
    """Put a ranker, tiny unless one is given, where `tracking.fetch` keeps its copy of a version; give the folder."""
    place = config.home() / "models" / "ranker" / version
    if not place.exists():
        if package:
            shutil.copytree(package, place / "package")
        else:
            packages.seal(place / "package", seed=int(version) if seed is None else seed)
        (place / "replay.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples()))
        checksums = {"content": artifacts.sha256(place / "package"), "replay": artifacts.sha256(place / "replay.jsonl")}
        artifacts.write_json(place / "version.json", checksums)
    return place


def counters(params: Params, name: str, before: Counter[str] | None = None, total: int = 0) -> Counter[str]:
    """Read a family of the gateway's counters by its labels, less those of `before`.

    A request is counted just after its answer: wait a moment until the sum is `total` or more.
    """
    deadline = time.monotonic() + 10
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{params.stack.metrics_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(name))
        found = Counter({series.removeprefix(name): round(float(value)) for series, value in pairs})
        found -= before or Counter()
        if sum(found.values()) >= total or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


@dataclass(frozen=True)
class Here:
    """A stack that is up."""

    home: Path
    params: Params
    platform: LocalPlatform


@contextmanager
def running(home: Path, chosen: Params, programs: Sequence[str] = SERVICE) -> Iterator[Here]:
    """Bring up programs of a stack whose state lies in `home`, and end it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPWAY_HOME", str(home))
        stack.up(chosen, programs, tell=lambda _: None)
        try:
            yield Here(home, chosen, LocalPlatform(chosen))
        finally:
            stack.down()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """Redis, gateway and Prometheus in a home of the module's own."""
    with running(tmp_path_factory.mktemp("a home"), params()) as up:
        yield up


@pytest.fixture(scope="module")
def local_platform(here: Here) -> LocalPlatform:
    """The platform of a stack that is up."""
    return here.platform
