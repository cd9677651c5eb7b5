"""Installing system programs: what can be tried without changing the machine that runs the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slipway.errors import StackError
from slipway.platforms.local import system
from tests.conftest import ROOT, needs

ABSENT = system.Package("slipway-absent", ["no-such-program"], ["no/such/*.file"])


def test_a_package_is_here_by_its_program_or_by_its_file() -> None:
    assert system.Package("shell", ["no-such-program", "sh"]).is_here()
    assert system.Package("proc", patterns=["no/such/file", "proc/*/stat"]).is_here()
    assert not ABSENT.is_here()


def test_without_apt_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match="no apt-get on this machine: install these packages.*slipway-absent"):
        system.install([ABSENT])


@needs("nginx", "redis-server", "prometheus", "prometheus-alertmanager")
def test_setup_does_nothing_where_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = system.POLICY.exists()
    with monkeypatch.context() as without_apt:
        without_apt.setenv("PATH", str(tmp_path))
        system.install()
    command = [sys.executable, "-m", "slipway.platforms.local", "setup"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert system.POLICY.exists() == before
