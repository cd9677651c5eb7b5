"""dvc.yaml tells the truth: what a stage imports is what makes it run again, and no output is git's."""

from __future__ import annotations

import subprocess
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT

STAGES: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
# What all stages stand on; a change here that alters a result is told by a change of params or of the data's form.
SHARED = {"stage", "commands", "config", "params", "errors", "artifacts", "progress", "package"}
SHARED |= {"locks", "store", "tracking", "record"}


@pytest.fixture(scope="module")
def graph() -> Any:
    return grimp.build_graph("slipway", "tasks")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_it_imports(stage: str, graph: Any) -> None:
    deps = [dep.removesuffix(".py").replace("/", ".") for dep in STAGES[stage]["deps"]]
    seen: set[str] = set()
    queue = [f"tasks.{stage}"]
    while queue:
        for module in graph.find_modules_directly_imported_by(queue.pop()):
            if module in seen or module.split(".")[1] in SHARED or module.split(".")[1] in {"workloads", "platforms"}:
                continue
            seen.add(module)
            queue.append(module)
    missing = sorted(m for m in seen if m != "slipway" and not any(m == d or m.startswith(f"{d}.") for d in deps))
    assert missing == [], f"dvc.yaml: {stage}: add to deps"
    assert f"tasks/{stage}.py" in STAGES[stage]["deps"]


def test_git_tracks_no_output_and_ignores_every_one() -> None:
    for stage in STAGES.values():
        for path in stage["outs"]:
            assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0, path
            tracked = subprocess.run(["git", "ls-files", path], cwd=ROOT, capture_output=True, check=True)
            assert tracked.stdout == b"", path


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_held_to_its_section_of_the_params(stage: str) -> None:
    assert {"workload", stage} <= set(STAGES[stage]["params"])
