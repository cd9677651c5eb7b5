from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from slipway import stage
from slipway.errors import DataError, ParamsError, SlipwayError, TransientError
from slipway.stage import Report


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(Path("reports/ingest.json").read_text())
    return value


def test_a_stage_that_ends_well_leaves_what_it_found() -> None:
    def work(found: Report) -> None:
        found["rows"] = 3

    assert stage.call("ingest", work) == 0
    assert report()["status"] == "done"
    assert report()["rows"] == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("events.csv: row 7: 2 fields, 3 expected"), 2),
        (TransientError("the gateway is starting"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "data/ingest"), 2),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_its_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: Report) -> None:
        raise error

    assert stage.call("ingest", work) == code
    told = capsys.readouterr().err.strip()
    assert told.startswith("ingest: ")
    assert "\n" not in told
    assert report()["status"] == "failed"
    if isinstance(error, SlipwayError):
        assert report()["error"] == str(error)


def test_a_bug_keeps_its_traceback() -> None:
    def work(_: Report) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        stage.call("ingest", work)
    assert report()["error"] == "ZeroDivisionError: a bug"


@pytest.mark.parametrize("text", ["{", "3", "[]", '"x"'])
def test_form_values_that_are_no_object_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stage.CONF_VARIABLE, text)
    with pytest.raises(ParamsError, match="SLIPWAY_CONF"):
        stage.conf()
