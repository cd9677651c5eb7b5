"""The history of releases survives what a power cut does to a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipway.release import history


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))


def test_a_rollback_goes_to_what_the_last_promotion_replaced_and_only_once() -> None:
    assert history.previous("ranker") is None
    history.append("promote", "ranker", "1", replaced=None)
    history.append("promote", "ranker", "2", replaced="1")
    history.append("promote", "other", "7", replaced="6")
    history.append("canary", "ranker", "3", verdict="rollback")
    assert history.previous("ranker") == "1"
    history.append("rollback", "ranker", "1", rolled_back="2")
    assert history.previous("ranker") is None


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_line_is_lost_alone(cut: int) -> None:
    history.append("promote", "ranker", "2", replaced="1")
    history.append("promote", "ranker", "3", replaced="2")
    whole = history.path().read_bytes()
    history.path().write_bytes(whole[:-cut])
    history.append("deploy", "ranker", "4")
    # Without its line end alone, the line is still whole.
    assert [event["version"] for event in history.events("ranker")] == (["2", "3", "4"] if cut == 1 else ["2", "4"])


def test_an_event_is_a_line_that_people_can_read() -> None:
    history.append("end-canary", "ranker", "3", champion="2")
    (event,) = history.events("ranker")
    assert event.pop("time").startswith("20")
    assert event == {"event": "end-canary", "workload": "ranker", "version": "3", "champion": "2"}
