"""What all tests share: the programs that a test needs, free ports, waiting, one profile for laws."""

from __future__ import annotations

import random
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

# Timings vary with what else the machine does; a law is judged by what it says, the suite's timeout by how long.
hypothesis.settings.register_profile("slipway", deadline=None, derandomize=True)
hypothesis.settings.load_profile("slipway")

pytest_plugins = ("tests.platforms.stand", "tests.noise")

ROOT = Path(__file__).parents[1]
SLOW_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give what is slow on a quiet machine the time that it takes on a busy one."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test, with its reason, where a program it runs is not installed."""
    missing = [name for name in programs if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    how = "install it" if missing == ["chromium"] else "run `make setup`"  # no user of the product needs a browser
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: {how}")


def until(true: Callable[[], object], seconds: float = 150.0) -> None:
    """Wait for a condition, for long: how soon it comes true is the machine's affair."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"it did not come about in {seconds:g} s"
        time.sleep(0.01)


def working_in(folder: Path) -> list[int]:
    """Processes whose working directory is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is not ours to read
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


def free_port() -> int:
    """Give a port of the loopback interface that nothing listens on, another one each time.

    Below those that the kernel gives to outgoing connections: one of them could take it before the test's server does.
    """
    while True:
        port = _PORTS.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port


_PORTS = random.Random()  # its own: a test may seed the shared one
_GIVEN: set[int] = set()
