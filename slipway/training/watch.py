"""What a training run does with its time: every part of a step on one clock.

    with watch.part("backward"):
        ...
        with watch.part("communication"):  # inside: its time counts here alone, not in backward too
            ...
    watch.sent(tensor.nbytes)      # bytes that this process gave to the network
    watch.gauge("workers", 3)      # a figure of a technique: its latest value is shown beside the others

Times are the host's: on an accelerator, kernels run on behind them, and a part that waits for one has its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

PARTS = ("data", "forward", "backward", "communication", "optimizer", "validation", "checkpoint")

_spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
_open: list[part] = []
_sent = 0
_gauges: dict[str, float] = {}
_mark: Callable[[str], AbstractContextManager[Any]] | None = None
# One stack a process, like the root logger, so that a collective deep in a hook needs no clock handed down. The thread
# that trains waits while autograd's own threads run hooks, so the stack is never used by two at once.


class part:  # noqa: N801  # reads as a verb's object where it is used
    """Count the time inside as that of one of `PARTS`, less what parts inside of it take."""

    __slots__ = ("_began", "_inside", "_marked", "_name")

    def __init__(self, name: str) -> None:
        if name not in _spent:
            raise KeyError(name)
        self._name, self._inside = name, 0.0
        self._marked = _mark(name) if _mark else nullcontext()

    def __enter__(self) -> None:
        _open.append(self)
        self._marked.__enter__()
        self._began = time.perf_counter()

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        whole = time.perf_counter() - self._began
        self._marked.__exit__(None, None, None)
        _open.pop()
        _spent[self._name] += whole - self._inside
        if _open:
            _open[-1]._inside += whole


def spent() -> dict[str, float]:
    """Seconds that this process has spent in each part so far."""
    return dict(_spent)


def sent(size_bytes: float) -> None:
    """Count bytes that this process sent to others while it trained."""
    global _sent
    _sent += int(size_bytes)


def sent_bytes() -> int:
    """Bytes that this process has sent so far."""
    return _sent


def gauge(name: str, value: float) -> None:
    """Tell the latest value of a figure, such as the number of a loader's workers; `name` as MLflow allows it."""
    _gauges[name] = float(value)


def gauges() -> dict[str, float]:
    """The latest value of every figure that was told."""
    return dict(_gauges)


def mark(each: Callable[[str], AbstractContextManager[Any]] | None) -> None:
    """Enter `each(name)` with every part from now on, so that a profiler's trace names them; None: no more."""
    global _mark
    _mark = each
