"""What a replica weighs: the packages that it needs, and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipway import config
from tests.conftest import ROOT
from tests.serving import bare
from tests.serving.conftest import Replica
from tests.serving.packages import key

NOT_THERE = {"apache-airflow", "deepspeed", "torch", "pandas", "mlflow", "matplotlib", "great-expectations", "pyarrow"}
MAX_MB = 200


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bare.make(tmp_path_factory.mktemp("bare") / "site")


@pytest.fixture
def replica(path: str, package: Path, tmp_path: Path) -> Iterator[Replica]:
    running = Replica(package, tmp_path / "log", options=bare.ALONE, PYTHONPATH=path, SLIPWAY_HOME=str(tmp_path))
    yield running
    running.close()


def test_a_replica_runs_on_its_own_extra_alone_and_is_small(replica: Replica) -> None:
    assert not bare.distributions("serving") & NOT_THERE
    replica.wait_until_ready()
    assert replica.post("/v1/recommend", {"history": [key(1)]}).status == 200
    tensor = {"name": "history", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
    assert replica.post("/v2/models/ranker/infer", {"inputs": [tensor]}).status == 200
    for page in ("/metrics", "/openapi.json", "/docs", "/v2"):
        assert replica.get(page).status == 200
    status = Path(f"/proc/{replica.process.pid}/status").read_text()
    peak_mb = int(status.split("VmHWM:")[1].split()[0]) / 1024
    assert peak_mb < MAX_MB, f"a replica of a tiny model takes {peak_mb:.0f} MB"


@pytest.mark.parametrize("workload", config.workload_names())
def test_every_workload_is_served_on_that_extra_alone(path: str, workload: str) -> None:
    code = f"import slipway.serving.__main__, slipway.tracking, slipway.workloads.{workload}.schema"
    done = subprocess.run(
        [sys.executable, *bare.ALONE, "-c", code],
        env={"PYTHONPATH": path, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
