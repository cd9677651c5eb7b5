"""What all tests share: the programs that a test needs, free ports, one profile for laws."""

from __future__ import annotations

import random
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

# Timings vary with what else the machine does; a law is judged by what it says, the suite's timeout by how long.
hypothesis.settings.register_profile("slipway", deadline=None, derandomize=True)
hypothesis.settings.load_profile("slipway")

pytest_plugins = ("tests.platforms.stand",)

ROOT = Path(__file__).parents[1]


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test, with its reason, where a program it runs is not installed."""
    missing = [name for name in programs if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: run `make setup`")


def free_port() -> int:
    """Give a port of the loopback interface that nothing listens on.

    Below those that the kernel gives to outgoing connections: one of them could take it before the test's server does.
    """
    while True:
        port = _PORTS.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


_PORTS = random.Random()  # its own: a test may seed the shared one
