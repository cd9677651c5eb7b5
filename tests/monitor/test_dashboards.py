"""The dashboards: the files are what the code writes, and every expression is sound and names what there is."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, needs

GRAFANA = ROOT / "infra" / "grafana"
NAME = re.compile(r"\b(?:slipway|process|track|version|class|replica|cache|pool)[_:][a-z0-9_:]*")


@pytest.fixture(scope="module")
def code() -> dict[str, Any]:
    return runpy.run_path(str(GRAFANA / "dashboards.py"))


def expressions() -> Iterator[str]:
    for path in (GRAFANA / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            yield from (target["expr"] for target in panel.get("targets", []))


def test_the_files_are_what_the_code_writes(code: dict[str, Any]) -> None:
    written = {f"{board.name}.json": code["render"](board) for board in code["BOARDS"]}
    assert {p.name: p.read_text() for p in (GRAFANA / "dashboards").iterdir()} == written, (
        "run python infra/grafana/dashboards.py"
    )


def test_every_expression_names_what_is_told_or_recorded() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    rules = "".join(path.read_text() for path in (ROOT / "infra" / "prometheus" / "rules").glob("*.yml"))
    known = told | set(re.findall(r"- record: (\S+)", rules))
    named = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(named) > 25
    assert {name for name in named if name.removesuffix("_bucket") not in known} == set()


@needs("promtool")
def test_every_expression_is_promql(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": expression} for n, expression in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    command = ["promtool", "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_provisioned_is_what_the_dashboards_ask(code: dict[str, Any]) -> None:
    read = YAML(typ="safe").load
    (source,) = read((GRAFANA / "provisioning/datasources/slipway.yaml").read_text())["datasources"]
    assert source["uid"] == code["SOURCE"].uid
    for path in (GRAFANA / "dashboards").glob("*.json"):
        board = json.loads(path.read_text())
        sources = {panel["datasource"]["uid"] for panel in board["panels"] if panel["type"] != "row"}
        assert sources == {source["uid"]}
        assert all(panel["options"]["legend"] for panel in board["panels"] if panel["type"] != "row")
