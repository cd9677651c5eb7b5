"""Micro-batching: what waits together runs together, in one worker thread off the event loop.

It is work-conserving: an idle engine takes at once what is there. While it runs the next batch gathers, and its thread
takes it itself: to be handed it would cost a wake-up more. With `max_wait_s` it waits a little where that makes a batch
worth its run (`pace.py`). A request is a group of samples that stay together; `put` tells a function of their results,
without a task or a future, `submit` lets a coroutine wait.

Who cannot be answered in time is refused before it costs the engine anything: at once where the queue and the engine's
measured time say so, else when its time is up. Cancelling takes a request out of the queue.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
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

    def left(self, waited_s: Sequence[float]) -> None:
        """One batch left the queue for the engine; how long each of its requests had waited, the oldest first."""

    def ran(self, samples: int, seconds: float) -> None:
        """The engine ran one batch."""


Outcome = list[R] | Exception


class Job(Generic[T, R]):
    """A request that waits or runs."""

    __slots__ = ("_queue", "deadline", "done", "queued", "samples")

    def __init__(
        self,
        samples: Sequence[T],
        done: Callable[[Outcome[R]], None],
        queued: float,
        deadline: float,
        queue: _Queue[T, R],
    ) -> None:
        self.samples, self.queued, self.deadline, self._queue = samples, queued, deadline, queue
        self.done: Callable[[Outcome[R]], None] | None = done

    def settle(self, outcome: Outcome[R]) -> None:
        """Tell what became of it, once."""
        done, self.done = self.done, None
        if done is not None:
            done(outcome)

    def cancel(self) -> None:
        """Take it out of the queue; nobody hears of it any more."""
        self.done = None
        self._queue.drop(self)


class Batch(Generic[T, R]):
    """Jobs that run together."""

    __slots__ = ("began", "jobs", "outcomes", "seconds", "size")

    def __init__(self, jobs: Sequence[Job[T, R]], size: int, began: float) -> None:
        self.jobs, self.size, self.began = jobs, size, began
        self.outcomes: Sequence[Outcome[R]] = ()
        """Of each job, once it ran."""
        self.seconds = 0.0


class _Queue(Generic[T, R]):
    """Jobs in the order in which they came; the loop adds them, the engine's thread takes them, under `lock`."""

    def __init__(self) -> None:
        self.jobs: dict[Job[T, R], None] = {}
        self.samples = 0
        self.lock = threading.Lock()

    def add(self, job: Job[T, R]) -> None:
        self.jobs[job] = None
        self.samples += len(job.samples)

    def waiting(self) -> Sequence[Job[T, R]]:
        """Give all, the oldest first."""
        with self.lock:
            return tuple(self.jobs)

    def take(self, most: int, now: float) -> Batch[T, R] | None:
        """Take the oldest that fit into a batch; those whose time is up are left for `_look`."""
        jobs, room = [], most
        for job in self.jobs:
            if job.deadline <= now:
                continue
            if len(job.samples) > room:
                break
            room -= len(job.samples)
            jobs.append(job)
        for job in jobs:
            del self.jobs[job]
        self.samples -= most - room
        return Batch(jobs, most - room, now) if jobs else None

    def drop(self, job: Job[T, R]) -> None:
        """Take one out, if it is there."""
        with self.lock:
            if job in self.jobs:
                del self.jobs[job]
                self.samples -= len(job.samples)


class Worker(Generic[T, R]):
    """One thread that runs one batch after another, and tells the event loop; made there.

    Args:
        take: gives the next batch, if there is one; called by the thread, as `run` is.
        run: fills in what became of it.
        done: is told of it, on the loop, once the next one was taken.
    """

    def __init__(
        self,
        take: Callable[[], Batch[T, R] | None],
        run: Callable[[Batch[T, R]], None],
        done: Callable[[Batch[T, R]], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._take, self._run, self._done = take, run, done
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.alive = True
        """Does the thread still run? Told by itself: `threading` takes a lock to know, and each request asks twice."""
        threading.Thread(target=self._run_all, name="engine", daemon=True).start()

    def wake(self) -> None:
        """Let the idle thread take what is there."""
        self._calls.put(True)

    def close(self) -> None:
        """End the thread when nothing waits."""
        self._calls.put(False)

    def _run_all(self) -> None:
        try:
            while self._calls.get():
                self._run_each()
        finally:
            self.alive = False

    def _run_each(self) -> None:
        batch = self._take()
        while batch is not None:
            self._run(batch)
            ran, batch = batch, self._take()
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                self._loop.call_soon_threadsafe(self._done, ran)


class Batcher(Generic[T, R]):
    """Runs `work` on batches of samples; made and used on the event loop.

    Args:
        work: gives one result for each sample; called by the worker, one call at a time.
        max_batch: most samples in one call.
        max_wait_s: longest wait of an idle engine for a batch that is worth its run.
        max_queue: most requests that wait.
        observer: hears of every batch.
        worker: makes what runs the work; a thread of its own, unless a test simulates one.
        clock: seconds, of deadlines too.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R]],
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        observer: Observer,
        worker: Callable[..., Worker[T, R]] = Worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._observer, self._clock = work, observer, clock
        self._max_batch, self._max_wait_s, self._max_queue = max_batch, max_wait_s, max_queue
        self._pace = Pace(max_batch, max_wait_s)
        self._queue: _Queue[T, R] = _Queue()
        self._loop = asyncio.get_running_loop()
        self._start: asyncio.Handle | None = None
        self._called = self._looking = False  # may the engine take what waits; is `_look` to come
        self._running: Batch[T, R] | None = None
        self._ends = 0.0  # of what runs, as far as can be told
        self._ran = self._told = 0  # batches, by the engine's thread and by the loop
        self._worker = worker(self._take, self._run, self._finish)

    def __len__(self) -> int:
        """Count the requests that wait."""
        return len(self._queue.jobs)

    @property
    def alive(self) -> bool:
        """Is there still a thread that runs the batches?"""
        return self._worker.alive

    @property
    def ails(self) -> str:
        """Say what is wrong with the engine; nothing if it is well."""
        if not self._worker.alive:
            return DEAD
        running = self._running
        if running is None:
            return ""
        seconds = self._clock() - running.began
        stalled = seconds > max(STALL_S, STALL_RATIO * self._pace.takes_s(running.size))
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
        self.admit(len(samples), deadline)
        future: asyncio.Future[list[R]] = self._loop.create_future()
        job = self.put(samples, deadline, partial(_resolve, future))
        try:
            return await future
        except asyncio.CancelledError:
            job.cancel()
            raise

    def put(self, samples: Sequence[T], deadline: float, done: Callable[[Outcome[R]], None]) -> Job[T, R]:
        """Queue `samples` that were admitted; `done` gets their outcome later, unless the job is cancelled.

        Args:
            samples: what is to be run, together.
            deadline: moment by which the results are wanted.
            done: called on the loop, once; it must not raise.
        """
        now = self._clock()
        if self._max_wait_s:
            self._pace.arrived(now, len(samples))
        job: Job[T, R] = Job(samples, done, now, deadline, self._queue)
        with self._queue.lock:
            self._queue.add(job)
            idle = self._running is None
        if idle:
            self._schedule()
        return job

    def close(self) -> None:
        """End the worker when nothing waits."""
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
        needed_s = self._needed_s(samples, now)
        if needed_s == math.inf:
            raise OverloadError(f"{self._max_queue} requests are waiting already; try again later")
        if needed_s and now + needed_s > deadline:
            left_s = max(0.0, deadline - now)
            raise OverloadError(
                f"it would take {1e3 * needed_s:.0f} ms, and {1e3 * left_s:.0f} are left; try again later"
            )

    def late(self, samples: int, patience_s: float) -> bool:
        """Would `admit` refuse? It costs no exception and no text."""
        needed_s = self._needed_s(samples, self._clock())
        return needed_s == math.inf or needed_s > patience_s

    def _needed_s(self, samples: int, now: float) -> float:
        """Time until samples that come now would be done; 0 for an idle engine, infinite where the queue is full."""
        waiting = len(self._queue.jobs)
        if waiting >= self._max_queue:
            return math.inf
        if not (self._running or waiting):
            return 0.0
        left_s = max(0.0, self._ends - now) if self._running else 0.0
        return self._pace.ready_in_s(self._queue.samples, samples, left_s)

    def _schedule(self) -> None:
        """Start in the loop's next turn, so that requests that came in one go run in one go; or after the wait."""
        if not self._looking:
            self._looking = True
            self._loop.call_later(LOOK_S, self._look)
        if not self._max_wait_s:
            if self._start is None:
                self._start = self._loop.call_soon(self._call)
            return
        if self._start is not None:
            self._start.cancel()
        jobs, samples = self._queue.waiting(), self._queue.samples
        if not jobs:  # just taken
            return
        last_start = min(job.deadline for job in jobs) - self._pace.takes_s(samples)
        wait_s = self._pace.start(jobs[0].queued, samples, last_start) - self._clock()
        self._start = self._loop.call_later(wait_s, self._call) if wait_s > 0 else self._loop.call_soon(self._call)

    def _call(self) -> None:
        self._start = None
        if self._running is None:
            self._called = True
            self._worker.wake()

    def _take(self) -> Batch[T, R] | None:
        """Take the next batch, in the engine's thread: where it is to wait, only when it is called.

        It is never more than a batch ahead of the loop, which in a flood needs the processor more than the engine does.
        """
        with self._queue.lock:
            may, self._called = (self._called or not self._max_wait_s) and self._ran - self._told <= 1, False
            now = self._clock()
            self._running = batch = self._queue.take(self._max_batch, now) if may else None
            if batch is not None:
                self._ends = now + self._pace.takes_s(batch.size)
        return batch

    def _look(self) -> None:
        """While anybody waits, tell those whose time is up: the engine may never come back."""
        now, alive, running = self._clock(), self._worker.alive, self._running
        for job in (*(running.jobs if running else ()), *self._queue.waiting()):
            if job.deadline <= now or not alive:
                self._queue.drop(job)
                job.settle(_late() if alive else TransientError(DEAD))
        self._looking = running is not None or bool(self._queue.jobs)
        if self._looking:
            self._loop.call_later(LOOK_S, self._look)

    def _run(self, batch: Batch[T, R]) -> None:
        began = self._clock()
        batch.outcomes = self._outcomes(batch.jobs)
        batch.seconds = self._clock() - began
        self._ran += 1

    def _outcomes(self, jobs: Sequence[Job[T, R]]) -> Sequence[Outcome[R]]:
        """Run a batch; if it fails, its requests one by one, so that only the guilty one fails."""
        try:
            results = self._work([sample for job in jobs for sample in job.samples])
        except Exception as error:  # noqa: BLE001  # whatever the engine raises belongs to the requests
            return [error] if len(jobs) == 1 else [self._outcomes([job])[0] for job in jobs]
        outcomes: list[Outcome[R]] = []
        at = 0
        for job in jobs:
            outcomes.append(list(results[at : at + len(job.samples)]))
            at += len(job.samples)
        return outcomes

    def _finish(self, batch: Batch[T, R]) -> None:
        self._told += 1
        took_s = self._clock() - batch.began  # with what it waited for the loop: under load, most of it
        self._pace.ran(batch.size, took_s)
        if self._running is None and self._queue.jobs:  # who waits a little, or came as the thread found nobody
            self._schedule()
        self._observer.left([batch.began - job.queued for job in batch.jobs])
        self._observer.ran(batch.size, batch.seconds)
        for job, outcome in zip(batch.jobs, batch.outcomes, strict=True):
            job.settle(outcome)


def _late() -> DeadlineError:
    return DeadlineError("its time was up before it could be answered; try again later")


def _resolve(future: asyncio.Future[list[R]], outcome: Outcome[R]) -> None:
    if future.done():  # cancelled in this very turn
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
