"""Batches made ahead while the model computes: in the rank itself, or in as many worker processes as keep it busy.

A batch is a function of the seed, the epoch and its place in it (`slipway.workloads.base.Task`), so it does not matter
who makes it: the rank orders each of its batches once and takes them in that order, and training stays the same, bit
for bit, however many workers come and go. A run goes on in mid-epoch by ordering the rest of the epoch.

With `workers: auto` the loader begins without a process. Over windows of a second and more it measures which share of
the time the model computes: under 70 % a worker is added, over 90 % an idle one is taken away. A further
one that does not make training faster is sent off again, and one that was missed is not sent off soon.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from slipway.params import LoaderParams
from slipway.training import watch
from slipway.training.workers import Source, Worker, made
from slipway.workloads.base import Tensors

STARVED, SATED = 0.70, 0.90  # shares of the time that the model computes: add a worker below, take one away above
GAIN = 1.05  # ratio of batches/s that an added worker has to bring
HEADROOM = 0.8  # share of their time that the workers who stay may be at work
TRIALS = 2  # windows in one of which it has to: other programs disturb a single one
LIGHT = 0.1  # share of one worker's time that the rank itself takes over
WINDOW_S, WINDOW_BATCHES = 1.0, 8  # least length of a window
PAUSE = 8  # windows until a change that did not pay is tried again; doubled each time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """What was measured between two looks at the workers."""

    busy: float
    """Share of the time that the model computed, the rest being spent on waiting for data (0..1)."""
    load: float
    """Seconds that workers were making batches, per second: how many were at work on average."""
    rate: float
    """Batches/s."""


class Pace:
    """Decides how many workers a rank has, from one window to the next."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._before: Window | None = None  # the window that made us add the newest worker
        self._trials = 0  # windows that the newest worker has left to make a difference
        self._missed = False  # the last change took a worker away
        self._no_more = self._no_less = 0  # windows that have to pass before the next addition, or removal
        self._pause = PAUSE

    def next(self, workers: int, window: Window) -> int:
        """Give the number of workers for the next window: at most one more or one fewer."""
        before, self._before = self._before, None
        missed, self._missed = self._missed, False
        self._no_more, self._no_less = max(0, self._no_more - 1), max(0, self._no_less - 1)
        if before is not None and window.rate < GAIN * before.rate:
            self._trials -= 1
            if self._trials:
                self._before = before
                return workers
            self._no_more = self._paused()
            return workers - 1
        if window.busy < STARVED and workers < self._most and not self._no_more:
            self._trials = TRIALS
            self._before = window if workers else None  # the first one relieves the rank, whose pace it may just keep
            if missed:
                self._no_less = self._paused()
            return workers + 1
        if window.busy > SATED and workers and _idle(workers, window.load) and not self._no_less:
            self._missed = True
            return workers - 1
        return workers

    def _paused(self) -> int:
        pause, self._pause = self._pause, 2 * self._pause
        return pause


def _idle(workers: int, load: float) -> bool:
    return load <= (HEADROOM * (workers - 1) if workers > 1 else LIGHT)


@dataclass(frozen=True)
class _Order:
    epoch: int
    ranks: int
    batches: Sequence[Tensors]
    index: int
    batch: Future[Tensors] = field(default_factory=Future)


@dataclass(eq=False)
class _Seat:
    """One thread that takes orders, with a worker process or, in the rank itself, without."""

    worker: Worker | None
    ready: bool = False
    leaving: bool = False
    busy_s: float = 0.0


class Loader:
    """Gives one rank's batches in order and has the following ones made meanwhile; `workers` processes are at it now.

    >>> with Loader(make, params) as loader:
    ...     for batch in loader.epoch(epoch, ranks, task.epoch(epoch, ranks), indices):
    """

    def __init__(self, make: Callable[[], Source], params: LoaderParams) -> None:
        """Prepare, without a process or a thread.

        Args:
            make: makes the task in a worker; pickled.
            params: workers, and how many batches are made ahead.
        """
        self._make, self._prefetch = make, params.prefetch
        self._pace = Pace(params.max_workers) if params.workers == "auto" else None
        self.workers = 0 if params.workers == "auto" else params.workers
        self._changed = threading.Condition()
        self._orders: deque[_Order] = deque()  # not yet begun
        self._here = _Seat(None, ready=True)
        self._seats: list[_Seat] = []
        self._clock = _Clock()

    def __enter__(self) -> Self:
        self._begin(self._here)
        self.resize(self.workers)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._changed:
            seats = [self._here, *self._seats]
            for seat in seats:
                seat.leaving = True
            self._orders.clear()
            self._changed.notify_all()
        for seat in seats:
            if seat.worker is not None:
                seat.worker.close()

    def epoch(
        self, epoch: int, ranks: int, batches: Sequence[Tensors], indices: Sequence[int]
    ) -> Generator[Tensors, None, None]:
        """Give batches of an epoch in the order of `indices`; ends what an earlier call still had made ahead.

        The arrays may lie in memory shared with a worker; it is used again when nothing refers to them any more.

        Args:
            epoch: the epoch.
            ranks: the second argument of `Task.epoch`.
            batches: `Task.epoch(epoch, ranks)` of the rank's own task.
            indices: which of them.

        Raises:
            SlipwayError: as the task raised it, with the batch before its message.
            RuntimeError: any other exception of the task, with the batch and its traceback.
            TransientError: a worker was killed over one batch again and again.
        """
        with self._changed:
            self._orders.clear()
        ahead: deque[_Order] = deque()
        coming = iter(indices)
        self._clock.skip()  # what came before was no step: between two epochs the model is validated
        while True:
            more = max(0, 1 + self._prefetch + self.workers - len(ahead))
            fresh = [_Order(epoch, ranks, batches, index) for index in itertools.islice(coming, more)]
            with self._changed:
                self._orders.extend(fresh)
                self._changed.notify_all()
            ahead.extend(fresh)
            if not ahead:
                return
            batch = ahead.popleft().batch.result()
            self._clock.waited()
            self._look()
            yield batch
            del batch  # its memory may be used again
            self._clock.stepped()

    def resize(self, workers: int) -> None:
        """Begin or end worker processes until there are that many; one that leaves finishes its batch."""
        self.workers, self._clock = workers, _Clock()
        watch.gauge("data_workers", workers)
        while len(self._seats) < workers:
            self._seats.append(_Seat(Worker(self._make)))
            self._begin(self._seats[-1])
        with self._changed:
            while len(self._seats) > workers:
                self._seats.pop().leaving = True
            self._changed.notify_all()

    def _look(self) -> None:
        """Close the window if it is long enough, and let the pace decide on the workers."""
        if self._pace is None:
            return
        if not all(seat.ready for seat in self._seats):
            self._clock = _Clock()  # a worker that is still starting says nothing about the next one
            return
        window = self._clock.window(sum(seat.busy_s for seat in self._seats))
        if window is None:
            return
        workers = self._pace.next(self.workers, window)
        if workers != self.workers:
            log.info(
                "data workers: %d instead of %d busy=%.2f load=%.2f batches_per_s=%.1f",
                *(workers, self.workers, window.busy, window.load, window.rate),
            )
            self.resize(workers)

    def _begin(self, seat: _Seat) -> None:
        threading.Thread(target=self._work, args=(seat,), daemon=True, name="loader").start()

    def _work(self, seat: _Seat) -> None:
        """Take orders until the seat is given up: the life of one thread."""
        if seat.worker is not None:
            with contextlib.suppress(Exception):  # it is told with the first batch, which starts the process again
                seat.worker.start()
            seat.ready = True
        while (order := self._next(seat)) is not None:
            began = time.monotonic()
            try:
                order.batch.set_result(_made(seat, order))
            except Exception as error:  # noqa: BLE001  # whatever it was, it comes out where the batch is taken
                order.batch.set_exception(error)
            seat.busy_s += time.monotonic() - began
            del order  # its consumer may use the batch's memory again
        if seat.worker is not None:
            seat.worker.close()

    def _next(self, seat: _Seat) -> _Order | None:
        with self._changed:
            while not seat.leaving and not (self._orders and self._serves(seat)):
                self._changed.wait()
            return None if seat.leaving else self._orders.popleft()

    def _serves(self, seat: _Seat) -> bool:
        """The rank itself makes batches until the first worker is ready, and again after the last one left."""
        return seat is not self._here or not any(other.ready for other in self._seats)


def _made(seat: _Seat, order: _Order) -> Tensors:
    if seat.worker is None:
        return made(order.batches, order.epoch, order.index)
    return seat.worker.batch(order.epoch, order.ranks, order.index)


class _Clock:
    """Parts the time of the rank into waiting for data and the rest, which is the model's."""

    def __init__(self) -> None:
        self._mark = time.monotonic()
        self._load: float | None = None
        self._batches = 0
        self._waited_s = self._stepped_s = 0.0

    def stepped(self) -> None:
        self._stepped_s += self._lap()

    def skip(self) -> None:
        self._lap()

    def waited(self) -> None:
        self._waited_s += self._lap()
        self._batches += 1

    def window(self, busy_s: float) -> Window | None:
        """End the window if it is long enough. The first batch of all is waited for in any case: it is left out."""
        if self._load is None:
            self._load, self._batches, self._waited_s, self._stepped_s = busy_s, 0, 0.0, 0.0
        total = self._waited_s + self._stepped_s
        if total < WINDOW_S or self._batches < WINDOW_BATCHES:
            return None
        window = Window(self._stepped_s / total, (busy_s - self._load) / total, self._batches / total)
        self._load, self._batches, self._waited_s, self._stepped_s = busy_s, 0, 0.0, 0.0
        return window

    def _lap(self) -> float:
        mark, self._mark = self._mark, time.monotonic()
        return self._mark - mark
