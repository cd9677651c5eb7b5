from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slipway import artifacts
from slipway.errors import DataError

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from slipway import artifacts
with artifacts.writing(Path(sys.argv[1])) as beside:
    beside.mkdir()
    (beside / "part").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_while_writing_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    artifacts.write_json(path, {"a": 1})

    def fail() -> None:
        with artifacts.writing(path) as beside:
            beside.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert artifacts.read_json(path) == {"a": 1}
    assert names(tmp_path) == ["report.json"]


def test_a_killed_writer_leaves_the_old_folder_and_the_next_one_sweeps_up(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with artifacts.writing(folder) as beside:
        beside.mkdir()
        (beside / "part").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "part").read_text() == "old"
    with artifacts.writing(folder) as beside:
        beside.mkdir()
        (beside / "part").write_text("newer")
    assert (folder / "part").read_text() == "newer"
    assert names(tmp_path) == ["data"]


def test_a_folder_whose_swap_was_cut_off_comes_back(tmp_path: Path) -> None:
    old = tmp_path / ".data.999999999.abc.old"
    old.mkdir()
    (old / "part").write_text("old")
    with pytest.raises(RuntimeError), artifacts.writing(tmp_path / "data"):
        raise RuntimeError("the next writer fails too")
    assert (tmp_path / "data" / "part").read_text() == "old"


def test_not_a_number_never_reaches_a_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        artifacts.write_json(tmp_path / "report.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_missing_or_torn_report_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.json: no such file; run the stage that writes it first"):
        artifacts.read_json(tmp_path / "gone.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(DataError, match="torn.json: not valid JSON"):
        artifacts.read_json(tmp_path / "torn.json")


def test_the_hash_of_a_folder_sees_names_and_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("same")
    assert artifacts.sha256(tmp_path / "a") == artifacts.sha256(tmp_path / "b")
    (tmp_path / "b" / "part").rename(tmp_path / "b" / "other")
    assert artifacts.sha256(tmp_path / "a") != artifacts.sha256(tmp_path / "b")
