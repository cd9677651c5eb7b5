"""The rules, as promtool sees them, and what stands around them: runbooks, tests, the page of metrics."""

from __future__ import annotations

import subprocess
from typing import Any

from ruamel.yaml import YAML

from tests.conftest import ROOT, needs

RULES = sorted((ROOT / "infra" / "prometheus" / "rules").glob("*.yml"))
UNIT_TESTS = sorted((ROOT / "tests" / "monitor").glob("*.test.yml"))


def alerts() -> dict[str, Any]:
    groups = [group for path in RULES for group in YAML(typ="safe").load(path.read_text())["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


@needs("promtool")
def test_every_rule_does_what_its_test_says() -> None:
    done = subprocess.run(["promtool", "test", "rules", *UNIT_TESTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_runbook_of_three_parts_and_a_test() -> None:
    tested = "".join(path.read_text() for path in UNIT_TESTS)
    for name, rule in alerts().items():
        text = (ROOT / rule["annotations"]["runbook"]).read_text()
        parts = [text.find(f"**{part}.**") for part in ("What it means", "Look here", "Do this")]
        assert text.startswith(f"# {name}\n")
        assert 0 < parts[0] < parts[1] < parts[2], name
        assert f"alertname: {name}" in tested, f"{name}: no unit test sees it"
        assert rule["labels"]["severity"] in {"page", "ticket"}


def test_no_runbook_is_left_of_an_alert_that_is_gone() -> None:
    assert {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} == set(alerts())
