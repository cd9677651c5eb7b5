"""Locks between processes that share one state folder: held by the kernel, so a killed holder lets go."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from slipway import config


@contextmanager
def held(name: str) -> Iterator[None]:
    """Wait for the lock `name` of this state folder and hold it; it is not re-entrant."""
    path = config.home() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
