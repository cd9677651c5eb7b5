"""A pytest plugin: a test that failed while the machine itself stood still is run once more, and that is told.

A stall of half a second, as shared machines have them, looks to a test like a fault of what it tests. So a thread
measures how late it wakes up while a test runs, as the traffic's generator does. A failure on a machine that was
punctual stands at once; one on a machine that was not is judged again, twice at most. The summary lists them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pytest
from _pytest.runner import runtestprotocol  # what plugins that run a test again are built on

EVERY_S, LATE_S = 0.02, 0.15
RUNS = 3
ENOUGH_S = 60.0  # a test that takes longer is not run again: the limit of its time is for all runs together

_again = pytest.StashKey[list[str]]()


class Punctuality:
    """Measures, from `with` to its end, by how much a sleep took longer than it should at worst (s)."""

    def __init__(self) -> None:
        self.late_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="punctuality", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            time.sleep(EVERY_S)
            self.late_s = max(self.late_s, time.monotonic() - began - EVERY_S)


def pytest_configure(config: pytest.Config) -> None:
    """Begin with no test that was run again."""
    config.stash[_again] = []


@pytest.hookimpl
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test as pytest does, and again while the machine is to blame."""
    began = time.monotonic()
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(RUNS)):
        with Punctuality() as measured:
            reports = runtestprotocol(item, log=False, nextitem=nextitem)
        failed = any(report.failed for report in reports)
        if not (failed and left and measured.late_s > LATE_S and time.monotonic() - began < ENOUGH_S):
            break
        if reports[0].failed:  # what a fixture of the whole module raised is kept: it has to be made anew
            item.session._setupstate.teardown_exact(None)
        told = f"{item.nodeid}: the machine stood still for {measured.late_s:.2f} s: {_reason(reports)}"
        item.config.stash[_again].append(told)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reason(reports: Sequence[pytest.TestReport]) -> str:
    """The first line of what went wrong."""
    crash = getattr(next(report for report in reports if report.failed).longrepr, "reprcrash", None)
    return str(crash.message).splitlines()[0] if crash else "unknown"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List what was run again."""
    if again := config.stash[_again]:
        terminalreporter.section("failed on a machine that was not punctual, and run again")
        for line in again:
            terminalreporter.write_line(line)
