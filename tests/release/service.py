"""A service of one's own for releases: a scratch state folder, free ports, real nginx, Redis, Prometheus, tiny rankers.

Release tests and benchmarks run the stages on it, in this process, as the stages' commands would.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway import artifacts, config, platforms, stage, store, tracking
from slipway.errors import SlipwayError
from slipway.params import CanaryParams, ChaosParams, Params, PromoteParams, SloParams
from slipway.platforms.base import Platform
from slipway.platforms.local import stack
from slipway.release.replay import Replay, read
from tests.conftest import ROOT
from tests.platforms import stand
from tests.release import candidates

PROGRAMS = ("redis", "gateway", "prometheus")
WORKLOAD = "ranker"


@dataclass(frozen=True)
class Service:
    """A stack that is up, and the workspace in which stages run."""

    folder: Path
    params: Params
    platform: Platform

    def register(self, name: str, make: Callable[[Path], Path]) -> str:
        """Make a package and register it as the candidate; its version."""
        place = self.folder / "made" / name
        sealed = make(place / "package")
        samples = candidates.replay(place / "replay.jsonl", self._champion_like())
        run = store.start(f"made-{name}", {})
        version = tracking.register(WORKLOAD, sealed, samples, run, {"made": name})
        tracking.set_alias(WORKLOAD, "candidate", version)
        return version

    def _champion_like(self) -> Path:
        """What users choose does not depend on the version that is shown to them: it is as the good ranker thinks."""
        place = self.folder / "made" / "taste"
        return place if place.exists() else candidates.good(place)

    def step(self, name: str, params: Params | None = None, **conf: Any) -> dict[str, Any]:
        """Run a stage as its command would; its report.

        Raises:
            SlipwayError: what the stage raised; its report is written.
        """
        report = stage.Report(name, self.folder / "reports")
        if conf:
            os.environ[stage.CONF_VARIABLE] = json.dumps(conf)
        try:
            importlib.import_module(f"tasks.{name}").run(params or self.params, report)
            report.save("done")
        except SlipwayError as error:
            report.save("failed", str(error))
            raise
        finally:
            os.environ.pop(stage.CONF_VARIABLE, None)
        return self.report(name)

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m ARGUMENTS` in the workspace, as a user would."""
        if not (self.folder / "params.yaml").exists():
            shutil.copyfile(ROOT / "params.yaml", self.folder / "params.yaml")
            ports = self.params.stack.model_dump()
            config.override(self.folder / "params.yaml", {f"stack.{key}": port for key, port in ports.items()})
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def report(self, name: str) -> dict[str, Any]:
        """Read what a stage reported."""
        report: dict[str, Any] = artifacts.read_json(self.folder / "reports" / f"{name}.json")
        return report

    def load(self, rate_rps: float, seed: int = 1) -> Replay:
        """Users beside those that the stages replay."""
        samples = read(candidates.replay(self.folder / "users.jsonl", self._champion_like(), count=1000, seed=seed))
        return Replay(self.platform.inner_url, "/v1/recommend", samples, rate_rps, seed)


def brief(params: Params) -> Params:
    """Shorten the steps of a release to seconds."""
    return params.model_copy(
        update={
            "canary": CanaryParams(step_weights=(0.2, 0.5), interval_s=3.0, min_requests=20, replay_rate_rps=60.0),
            "chaos": ChaosParams(rate_rps=50.0, duration_s=3.0, max_p99_ms=3000.0, max_recovery_s=60.0),
            "promote": PromoteParams(warm_s=2.0),
            "slo": SloParams(p99_ms=500.0, max_error_ratio=0.02),  # a busy machine keeps them
        }
    )


@contextmanager
def service(folder: Path, shorten: Callable[[Params], Params] = brief) -> Iterator[Service]:
    """Bring up a stack whose state lies in `folder`, and end it."""
    params = shorten(stand.params())
    before = {key: os.environ.get(key) for key in ("SLIPWAY_HOME", "MLFLOW_TRACKING_URI")}
    os.environ["SLIPWAY_HOME"] = str(folder / "home")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'home' / 'mlflow' / 'mlflow.db'}"
    try:
        stack.up(params, PROGRAMS, tell=lambda _: None)
        try:
            yield Service(folder, params, platforms.connect(params))
        finally:
            stack.down()
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
