"""The whole path on a clone: a stack of its own, the DAGs in a real Airflow, a model promoted and a bad one refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipway import config
from slipway.params import Params
from tests.conftest import ROOT, needs
from tests.platforms import stand

ITEMS, USERS, EVENTS = 60, 400, 12
STARTED_BY_TEST = 900


@pytest.fixture
def clone() -> Iterator[Path]:
    """A clone of the checkout's last commit, with ports of its own; its stack is ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="slipway-") as temporary:
        folder = Path(temporary) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        (folder / ".slipway").mkdir(mode=0o700)
        yield folder
        ended = run(folder, "slipway.platforms.local", "down")
        assert ended.returncode == 0, ended.stderr


def run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    foreign = ("SLIPWAY_", "AIRFLOW__", "MLFLOW_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    environment |= {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=STARTED_BY_TEST
    )


def write_events(path: Path) -> None:
    """Users who walk round a ring of items, each from a start of its own: the next item is plain to a model."""
    rows = [f"u{user},i{(user * 7 + step) % ITEMS},{step}" for user in range(USERS) for step in range(EVENTS)]
    path.write_text("customer,product,day\n" + "\n".join(rows) + "\n")


def recommend(params: Params, history: list[str]) -> dict[str, object]:
    url = f"http://127.0.0.1:{params.stack.gateway_port}/v1/recommend"
    body = json.dumps({"history": history, "k": 3}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
        told: dict[str, object] = json.load(answer)
    return told


def processes_of(folder: Path) -> list[str]:
    """Command lines of all processes that work for the clone."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in environ.read_bytes():
                found.append(environ.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(STARTED_BY_TEST)
@needs("nginx", "redis-server", "prometheus", "git")
def test_a_model_is_promoted_and_a_bad_one_is_rolled_back_through_airflow(clone: Path) -> None:
    write_events(clone / "events.csv")
    quick = {
        "ingest.source": "events.csv",
        "ingest.columns.user": "customer",
        "ingest.columns.item": "product",
        "ingest.columns.time": "day",
        "train.epochs": 12,
        "train.world_size": 1,
        "canary.interval_s": 5.0,
        "canary.min_requests": 20,
        "chaos.duration_s": 3.0,
        "promote.warm_s": 1.0,
        # Limits of time that a busy machine keeps: what is shown here is the path, and that users notice nothing.
        "evaluate.max_latency_ms": 1000.0,
        "slo.p99_ms": 1000.0,
        "slo.max_error_ratio": 0.05,
        "chaos.max_p99_ms": 3000.0,
        "chaos.max_recovery_s": 60.0,
    }
    stand.write_params(clone / "params.yaml", stand.params(), **quick)
    params = config.load(clone / "params.yaml")
    git_before = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)

    demo = run(clone, "slipway.demo")
    assert demo.returncode == 0, f"{demo.stdout[-4000:]}\n{demo.stderr[-4000:]}"
    assert "The bad model was rolled back: online metric" in demo.stdout
    assert f"http://127.0.0.1:{params.stack.page_port} " in demo.stdout.split("Look around")[1], "no live page"
    assert " 0 of " in demo.stdout.split("to zero traffic;")[1], "a user's request failed"

    answer = recommend(params, ["i3", "i4", "i5"])
    items = answer["items"]
    assert isinstance(items, list)
    assert items[0]["item"] == "i6", answer

    git_after = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert git_after.stdout == git_before.stdout, "the runs touched the user's checkout"

    rolled_back = run(clone, "tasks.rollback")
    assert rolled_back.returncode == 0, rolled_back.stderr
    assert run(clone, "slipway.platforms.local", "down").returncode == 0
    assert processes_of(clone) == [], "down left these"
