"""Locks between processes that share one state folder: held by the kernel, so a killed holder lets go."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slipway import config


@contextmanager
def held(name: str) -> Iterator[None]:
    """Wait for the lock `name` of this state folder and hold it; it is not re-entrant."""
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def tried(name: str, holder: str) -> Iterator[str | None]:
    """Hold the lock `name` as `holder`, or do not wait: gives None, or who holds it already."""
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            yield stream.read().strip() or "unknown"
            return
        stream.truncate(0)
        stream.write(f"{holder}, process {os.getpid()}\n")
        stream.flush()
        yield None


def holder(name: str) -> str | None:
    """Read who holds the lock `name` now, as he called himself; it only looks, and is in nobody's way."""
    path = _path(name)
    try:
        inode = path.stat().st_ino
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if any(each[1] == "FLOCK" and each[5].rpartition(":")[2] == str(inode) for each in locks):
            return path.read_text().strip() or "unknown"
    except OSError:
        pass
    return None


def _path(name: str) -> Path:
    return config.home() / "locks" / f"{name}.lock"
