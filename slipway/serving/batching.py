"""Micro-batching: what waits together runs together, in one worker thread off the event loop.

It is work-conserving: an idle engine takes at once what is there, and while it runs the next batch gathers. A request
is a group of samples that stay together; its future gets their results. Cancelling the wait takes a request out of the
queue.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from slipway.errors import OverloadError

T = TypeVar("T")
R = TypeVar("R")


class Observer(Protocol):
    """Who wants to know how it goes; called on the event loop."""

    def waited(self, seconds: float) -> None:
        """One request left the queue for the engine."""

    def ran(self, samples: int, seconds: float) -> None:
        """The engine ran one batch."""


@dataclass(eq=False)
class _Job(Generic[T, R]):
    samples: Sequence[T]
    future: asyncio.Future[list[R]]
    queued: float = field(default_factory=time.monotonic)


_Outcome = list[R] | Exception


class Batcher(Generic[T, R]):
    """Runs `work` on batches of samples; made and used on the event loop.

    Args:
        work: gives one result for each sample; called in the worker thread, one call at a time.
        max_batch: most samples in one call.
        max_wait_s: longest wait of an idle engine for a batch to fill.
        max_queue: most requests that wait.
        observer: hears of every batch.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R]],
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        observer: Observer,
    ) -> None:
        self._work, self._observer = work, observer
        self._max_batch, self._max_wait_s, self._max_queue = max_batch, max_wait_s, max_queue
        self._queue: OrderedDict[_Job[T, R], None] = OrderedDict()
        self._loop = asyncio.get_running_loop()
        self._start: asyncio.Handle | None = None
        self._running = False
        self._batches: queue.SimpleQueue[list[_Job[T, R]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_all, name="engine", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Count the requests that wait."""
        return len(self._queue)

    async def submit(self, samples: Sequence[T]) -> list[R]:
        """Wait for the results of `samples`, at most `max_batch` of them.

        Raises:
            OverloadError: too many requests wait.
            Exception: what `work` raised for these samples alone.
        """
        if len(self._queue) >= self._max_queue:
            raise OverloadError(f"{self._max_queue} requests are waiting already; try again later")
        job: _Job[T, R] = _Job(samples, self._loop.create_future())
        self._queue[job] = None
        if not self._running:
            self._schedule()
        try:
            return await job.future
        except asyncio.CancelledError:
            self._queue.pop(job, None)
            raise

    def close(self) -> None:
        """End the worker thread after its present batch."""
        self._batches.put(None)

    def _schedule(self) -> None:
        """Start in the loop's next turn, so that requests that came in one go run in one go; or after the wait."""
        if self._start is None:
            wait_s = self._max_wait_s if len(self._queue) < self._max_batch else 0.0
            self._start = self._loop.call_later(wait_s, self._take) if wait_s else self._loop.call_soon(self._take)
        elif self._max_wait_s and len(self._queue) == self._max_batch:
            self._start.cancel()
            self._start = self._loop.call_soon(self._take)

    def _take(self) -> None:
        """Hand the oldest requests that fit into a batch to the worker."""
        self._start = None
        batch: list[_Job[T, R]] = []
        room, now = self._max_batch, time.monotonic()
        while self._queue and len(next(iter(self._queue)).samples) <= room:
            job, _ = self._queue.popitem(last=False)
            room -= len(job.samples)
            batch.append(job)
            self._observer.waited(now - job.queued)
        if batch:
            self._running = True
            self._batches.put(batch)

    def _run_all(self) -> None:
        """The worker thread."""
        while batch := self._batches.get():
            began = time.monotonic()
            outcomes = self._run(batch)
            seconds = time.monotonic() - began
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, outcomes, seconds)
            except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
                return

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
        self._running = False
        self._take()  # first: the engine works on while the answers are written
        self._observer.ran(sum(len(job.samples) for job in batch), seconds)
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.future.done():  # cancelled while it ran
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
