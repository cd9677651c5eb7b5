"""Progress of long work: a bar on a terminal, elsewhere (logs of Airflow, CI) a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 10.0


class Progress:
    """Counts work done and shows rate, time left and a few figures.

    >>> with Progress("train", total=1000, unit="samples") as progress:
    ...     progress.advance(32, loss=0.7)
    """

    def __init__(self, label: str, total: float | None, unit: str = "it", start: float = 0.0) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = self._start = start
        self._began = self._printed = time.monotonic()
        self._figures: dict[str, float | str] = {}
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self._show("done")
        if self._width:
            sys.stderr.write("\n")

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        """Count `amount` more units as done and show `figures` beside them."""
        self._done += amount
        self._figures.update(figures)
        now = time.monotonic()
        if now - self._printed >= (0.1 if sys.stderr.isatty() else LINE_EVERY_S):
            self._printed = now
            self._show(self._left(now))

    def _left(self, now: float) -> str:
        done = self._done - self._start
        if self._total is None or done <= 0:
            return ""
        return f"{_clock((now - self._began) * (self._total - self._done) / done)} left"

    def _show(self, tail: str) -> None:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done - self._start) / elapsed
        share = f" {self._done / self._total:4.0%}" if self._total else ""
        figures = "".join(f" {k}={v:.4g}" if isinstance(v, float) else f" {k}={v}" for k, v in self._figures.items())
        text = f"{self._label}{share} {self._done:,.0f} {self._unit} {rate:,.0f}/s{figures} {_clock(elapsed)} {tail}"
        if sys.stderr.isatty():
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()


def track(items: Iterable[T], label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items`, showing how far along they are."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
