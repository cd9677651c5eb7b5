from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipway import artifacts, config, stage
from slipway.workloads.ranker import expectations, sequences
from slipway.workloads.ranker.ingest import ingest
from tasks import validate

Row = tuple[str, str, object]
LIMITS = {"min_users": 10, "min_items": 5}


def rows(users: int = 30, shift: int = 0) -> list[Row]:
    """Events whose items have a long tail; `shift` moves the popularity to other items."""
    draw = np.random.default_rng(1)
    return [(f"u{u}", f"i{(int(draw.zipf(1.5)) + shift) % 12}", 10 * u + k) for u in range(users) for k in range(8)]


@pytest.fixture(scope="module", autouse=True)
def _great_expectations() -> None:
    """Import it once: its own imports warn of modules that Python deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import great_expectations  # noqa: F401


Validate = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Validate:
    """Ingest rows, harm the columns if wished, and run the stage: its exit code and report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))

    def run(events: list[Row], harm: Callable[[Path], None] | None = None, **limits: Any) -> tuple[int, dict[str, Any]]:
        source = tmp_path / "events.csv"
        source.write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in events))
        columns = {"user": "user", "item": "item", "time": "time"}
        params = config.parse({"ingest": {"source": str(source), "columns": columns}, "validate": {**LIMITS, **limits}})
        with artifacts.writing(validate.DATA) as folder:
            ingest(params, folder, {})
        if harm is not None:
            harm(validate.DATA)
        code = stage.call("validate", lambda report: validate.run(params, report))
        report: dict[str, Any] = artifacts.read_json(Path("reports/validate.json"))
        return code, report

    return run


def test_good_data_are_accepted_and_become_what_the_next_are_compared_with(validated: Validate) -> None:
    code, report = validated(rows())
    assert (code, report["verdict"], report["compared"]) == (0, "passed", False)
    assert artifacts.read_json(validate.ACCEPTED)["data_sha256"] == artifacts.sha256(validate.DATA)
    assert "nothing to compare with" in validate.PAGE.read_text()
    code, report = validated(rows())
    assert (code, report["compared"], report["figures"]["psi"], report["figures"]["volume_ratio"]) == (
        0,
        True,
        0.0,
        1.0,
    )


def test_a_drift_of_the_items_is_a_warning_and_the_data_are_accepted(validated: Validate) -> None:
    validated(rows())
    code, report = validated(rows(shift=5))
    assert (code, report["verdict"]) == (0, "warning")
    assert report["figures"]["psi"] > 0.2
    assert "psi" in report["warnings"][0]
    assert validate.ACCEPTED.exists()


def test_data_that_dwindled_are_refused_and_not_remembered(validated: Validate) -> None:
    validated(rows())
    code, report = validated(rows(users=12))
    assert code == 2
    assert "volume_ratio" in report["error"]
    assert not validate.ACCEPTED.exists()
    assert validated(rows())[1]["figures"]["volume_ratio"] == 1.0


def test_rows_with_nulls_and_repetitions_are_named(validated: Validate) -> None:
    again = rows()[:20]
    code, report = validated([*rows(), *again, ("u1", "", 5)], max_null_ratio=0.0, max_duplicate_ratio=0.05)
    assert code == 2
    assert "row=262 reason=null user=u1" in report["error"]
    assert "row=242 reason=duplicate user=u0" in report["error"]
    assert "reports/validate.html" in report["error"]
    page = validate.PAGE.read_text()
    assert '<td class="number">262</td>' in page
    assert "Offending rows" in page


def test_too_few_users_or_items_are_refused(validated: Validate) -> None:
    code, report = validated(rows(), min_users=31, min_items=13)
    assert code == 2
    assert [f["limits"]["column"] for f in report["findings"] if not f["passed"]] == ["users", "items"]


def test_an_id_out_of_range_and_a_time_that_goes_back_are_found_row_by_row(validated: Validate) -> None:
    def harm(folder: Path) -> None:
        items, times = np.load(folder / "items.npy"), np.load(folder / "times.npy")
        items[17], times[100] = 99, -5
        np.save(folder / "items.npy", items)
        np.save(folder / "times.npy", times)

    code, report = validated(rows(), harm)
    assert code == 2
    broken = {f["limits"]["column"]: f["rows"] for f in report["findings"] if not f["passed"]}
    assert [row["event"] for row in broken["item"]] == [17]
    assert [row["event"] for row in broken["since"]] == [100]


def test_data_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stage.call("validate", lambda report: validate.run(config.parse({}), report)) == 2
    assert "run the stage that writes it first" in artifacts.read_json(Path("reports/validate.json"))["error"]


def test_the_stability_index_is_the_sum_over_bins_of_the_formula(tmp_path: Path) -> None:
    data = sequences.Sequences(tmp_path, np.zeros(1, np.int64), np.zeros(0, np.int32), None, {"items": 2})
    data.__dict__.update(item_keys=["b", "new"], item_events=np.array([6, 2]))  # cached properties, set beforehand
    then, now, parts = expectations.stability(data, {"events": 10, "keys": ["b", "a"], "counts": [5, 5]})
    assert then.sum() == pytest.approx(1)
    assert now.sum() == pytest.approx(1)
    floor = expectations.FLOOR
    expected = [(p - q) * np.log(p / q) for p, q in ((0.75, 0.5), (floor, 0.5), (0.25, floor))]
    assert parts.sum() == pytest.approx(sum(expected))
