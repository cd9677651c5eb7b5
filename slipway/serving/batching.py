"""Micro-batching: what waits together runs together, in one worker thread off the event loop.

It is work-conserving: an idle engine takes at once what is there, and while it runs the next batch gathers. With
`max_wait_s` it waits a little where that makes a batch worth its run (`pace.py`). A request is a group of samples that
stay together; its future gets their results.

Who cannot be answered in time is refused before it costs the engine anything: at once where the queue and the engine's
measured time say so, else when its time is up. Cancelling the wait takes a request out of the queue.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from slipway.errors import DeadlineError, OverloadError, TransientError
from slipway.serving.pace import Pace

T = TypeVar("T")
R = TypeVar("R")

LOOK_S = 0.02
"""While the engine runs, those whose time is up are looked for this often."""
STALL_S, STALL_RATIO = 0.4, 4
"""A run is stalled when it took longer than that, and than so many times what such a run takes."""

DEAD = "the engine's thread is dead"


class Observer(Protocol):
    """Who wants to know how it goes; called on the event loop."""

    def waited(self, seconds: float) -> None:
        """One request left the queue for the engine."""

    def gathered(self, seconds: float) -> None:
        """One batch left it, so long after its first request came."""

    def ran(self, samples: int, seconds: float) -> None:
        """The engine ran one batch."""


class _Job(Generic[T, R]):
    __slots__ = ("deadline", "future", "queued", "samples")

    def __init__(self, samples: Sequence[T], future: asyncio.Future[list[R]], queued: float, deadline: float) -> None:
        self.samples, self.future, self.queued, self.deadline = samples, future, queued, deadline


_Outcome = list[R] | Exception
_Done = Callable[[list[_Outcome[R]], float], None]


class Worker(Generic[R]):
    """One thread that runs one task after another, and tells the event loop; made there."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: queue.SimpleQueue[tuple[Callable[[], list[_Outcome[R]]], _Done[R]] | None] = queue.SimpleQueue()
        self.alive = True
        """Does the thread still run? Told by itself: `threading` takes a lock to know, and each request asks twice."""
        threading.Thread(target=self._run_all, name="engine", daemon=True).start()

    def run(self, task: Callable[[], list[_Outcome[R]]], done: _Done[R]) -> None:
        """Run a task; `done` gets its outcomes and its seconds, on the loop."""
        self._tasks.put((task, done))

    def close(self) -> None:
        """End the thread after its present task."""
        self._tasks.put(None)

    def _run_all(self) -> None:
        try:
            self._run_each()
        finally:
            self.alive = False

    def _run_each(self) -> None:
        while item := self._tasks.get():
            task, done = item
            began = time.monotonic()
            outcomes = task()
            try:
                self._loop.call_soon_threadsafe(done, outcomes, time.monotonic() - began)
            except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
                return


class Batcher(Generic[T, R]):
    """Runs `work` on batches of samples; made and used on the event loop.

    Args:
        work: gives one result for each sample; called by the worker, one call at a time.
        max_batch: most samples in one call.
        max_wait_s: longest wait of an idle engine for a batch that is worth its run.
        max_queue: most requests that wait.
        observer: hears of every batch.
        worker: what runs the work; a thread of its own, unless a test simulates one.
        clock: seconds, of deadlines too.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R]],
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        observer: Observer,
        worker: Worker[R] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._observer, self._clock = work, observer, clock
        self._max_batch, self._max_wait_s, self._max_queue = max_batch, max_wait_s, max_queue
        self._pace = Pace(max_batch, max_wait_s)
        self._queue: OrderedDict[_Job[T, R], None] = OrderedDict()
        self._samples = 0  # in the queue
        self._loop = asyncio.get_running_loop()
        self._start: asyncio.Handle | None = None
        self._running: list[_Job[T, R]] = []
        self._size, self._began = 0, 0.0  # of what runs
        self._worker = worker or Worker()

    def __len__(self) -> int:
        """Count the requests that wait."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Is there still a thread that runs the batches?"""
        return self._worker.alive

    @property
    def ails(self) -> str:
        """Say what is wrong with the engine; nothing if it is well."""
        if not self._worker.alive:
            return DEAD
        if not self._running:
            return ""
        seconds = self._clock() - self._began
        stalled = seconds > max(STALL_S, STALL_RATIO * self._pace.takes_s(self._size))
        return f"the engine has not come back for {seconds:.1f} s" if stalled else ""

    async def submit(self, samples: Sequence[T], deadline: float = math.inf) -> list[R]:
        """Wait for the results of `samples`, at most `max_batch` of them.

        Args:
            samples: what is to be run, together.
            deadline: moment by which the results are wanted.

        Raises:
            OverloadError: too many requests wait for the results to come in time, or at all.
            DeadlineError: the results did not come in time.
            TransientError: the engine's thread is dead.
            Exception: what `work` raised for these samples alone.
        """
        now = self._clock()
        if self._max_wait_s:
            self._pace.arrived(now, len(samples))
        self.admit(len(samples), deadline)
        job: _Job[T, R] = _Job(samples, self._loop.create_future(), now, deadline)
        self._queue[job] = None
        self._samples += len(samples)
        if not self._running:
            self._schedule()
        try:
            return await job.future
        except asyncio.CancelledError:
            self._drop(job)
            raise

    def close(self) -> None:
        """End the worker after its present batch."""
        self._worker.close()

    def admit(self, samples: int, deadline: float) -> None:
        """Refuse what need not be tried; worth asking before a request is decoded, for that costs more than this.

        An idle engine tries all: only runs can show that it is fast again.

        Raises:
            OverloadError, TransientError: as `submit`.
        """
        now = self._clock()
        if not self._worker.alive:
            raise TransientError(DEAD)
        if len(self._queue) >= self._max_queue:
            raise OverloadError(f"{self._max_queue} requests are waiting already; try again later")
        if deadline == math.inf or not (self._running or self._queue):
            return
        left_s = max(0.0, self._began + self._pace.takes_s(self._size) - now) if self._running else 0.0
        needed_s = self._pace.ready_in_s(self._samples, samples, left_s)
        if now + needed_s > deadline:
            left_s = max(0.0, deadline - now)
            raise OverloadError(
                f"it would take {1e3 * needed_s:.0f} ms, and {1e3 * left_s:.0f} are left; try again later"
            )

    def late(self, samples: int, patience_s: float, more: int = 0) -> bool:
        """Would `admit` refuse, with `more` samples ahead that are not here yet? It costs no exception and no text."""
        if not (self._running or self._queue or more):
            return False
        if len(self._queue) + more >= self._max_queue:
            return True
        if patience_s == math.inf:
            return False
        left_s = self._began + self._pace.takes_s(self._size) - self._clock() if self._running else 0.0
        return self._pace.ready_in_s(self._samples + more, samples, max(0.0, left_s)) > patience_s

    def _schedule(self) -> None:
        """Start in the loop's next turn, so that requests that came in one go run in one go; or after the wait."""
        if not self._max_wait_s:
            if self._start is None:
                self._start = self._loop.call_soon(self._take)
            return
        if self._start is not None:
            self._start.cancel()
        oldest = next(iter(self._queue)).queued
        last_start = min(job.deadline for job in self._queue) - self._pace.takes_s(self._samples)
        wait_s = self._pace.start(oldest, self._samples, last_start) - self._clock()
        self._start = self._loop.call_later(wait_s, self._take) if wait_s > 0 else self._loop.call_soon(self._take)

    def _drop(self, job: _Job[T, R]) -> None:
        if job in self._queue:
            del self._queue[job]
            self._samples -= len(job.samples)

    def _take(self) -> None:
        """Hand the oldest requests that fit into a batch to the worker."""
        self._start = None
        batch: list[_Job[T, R]] = []
        room, now = self._max_batch, self._clock()
        while self._queue and len((job := next(iter(self._queue))).samples) <= room:
            self._drop(job)
            if job.future.done():  # cancelled in this very turn
                continue
            if job.deadline <= now:
                _expire(job)
                continue
            room -= len(job.samples)
            batch.append(job)
            self._observer.waited(now - job.queued)
        if batch:
            self._observer.gathered(now - batch[0].queued)
            self._running, self._size, self._began = batch, self._max_batch - room, now
            self._worker.run(lambda: self._run(batch), lambda outcomes, seconds: self._finish(batch, outcomes, seconds))
            self._loop.call_later(LOOK_S, self._look, batch)

    def _look(self, batch: list[_Job[T, R]]) -> None:
        """While a batch runs, tell those whose time is up: the engine may never come back."""
        if self._running is not batch:
            return
        now, alive = self._clock(), self._worker.alive
        for job in (*batch, *self._queue):
            if (job.deadline <= now or not alive) and not job.future.done():
                self._drop(job)
                _expire(job) if alive else job.future.set_exception(TransientError(DEAD))
        self._loop.call_later(LOOK_S, self._look, batch)

    def _run(self, batch: list[_Job[T, R]]) -> list[_Outcome[R]]:
        """Run a batch; if it fails, its requests one by one, so that only the guilty one fails."""
        try:
            results = self._work([sample for job in batch for sample in job.samples])
        except Exception as error:  # noqa: BLE001  # whatever the engine raises belongs to the requests
            return [error] if len(batch) == 1 else [self._run([job])[0] for job in batch]
        outcomes: list[_Outcome[R]] = []
        at = 0
        for job in batch:
            outcomes.append(list(results[at : at + len(job.samples)]))
            at += len(job.samples)
        return outcomes

    def _finish(self, batch: list[_Job[T, R]], outcomes: list[_Outcome[R]], seconds: float) -> None:
        size = self._size
        self._running = []
        self._pace.ran(size, self._clock() - self._began)  # with what it waited for the loop: under load, most of it
        if self._queue:  # first: the engine works on while the answers are written
            self._go_on()
        self._observer.ran(size, seconds)
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.future.done():  # cancelled while it ran, or its time was up
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    def _go_on(self) -> None:
        if self._max_wait_s:
            self._schedule()
        else:
            self._take()


def _expire(job: _Job[T, R]) -> None:
    job.future.set_exception(DeadlineError("its time was up before it could be answered; try again later"))
