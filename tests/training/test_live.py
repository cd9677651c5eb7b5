"""Figures on their way to MLflow never make training wait. That they arrive is shown in tests/test_tracking.py."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from slipway.training import live
from tests.conftest import free_port


def test_a_server_that_never_answers_costs_nothing_but_a_bounded_wait_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        told = live.Live("run")
        began = time.monotonic()
        for step in range(10 * live.QUEUE):
            told.put("live", step, 1, {"loss": 1.0})
        assert time.monotonic() - began < live.TIMEOUT_S / 2, "it waited for a call"
        assert len(told._waiting) <= live.QUEUE
        silent.settimeout(60)
        caller, _ = silent.accept()  # it is in the middle of its call
        began = time.monotonic()
        told.close()
        with caller:
            assert time.monotonic() - began < live.END_S + 3, "it waited for the whole of a call"


def test_without_a_server_it_is_told_once_and_the_end_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    told = live.Live("run")
    told.put("live", 1, 1, {"loss": 1.0})
    told.close()
    assert not told._thread.is_alive(), "it waits for somebody still"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] != []
    nobody = live.Live("")
    nobody.put("live", 1, 1, {"loss": 1.0})
    nobody.close()
