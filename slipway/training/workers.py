"""A process that makes batches for a rank: they come back through shared memory, where the rank reads them in place.

A batch is copied once, in the worker, into a slot: memory without a name (memfd), which the kernel frees with the last
process that holds it, however that one ends. Its descriptor goes to the rank once, through the pipe that otherwise
carries orders and the layouts of batches. A slot is free again when the last array in it is gone, so no consumer can
find its batch overwritten; one that is too small for a batch is replaced by a larger one.
"""

from __future__ import annotations

import logging
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Protocol

import numpy as np

from slipway import commands
from slipway.errors import SlipwayError, TransientError
from slipway.training import processes
from slipway.workloads.base import Array, Tensors

ALIGNED = 64  # bytes: a cache line, and all that vector instructions ask for
TRIES = 3  # processes that may die over one batch before it is the batch's fault
GRACE_S = 5.0

Layout = list[tuple[str, str, tuple[int, ...], int]]
"""Name, dtype, shape and offset in the slot of each array of a batch."""

log = logging.getLogger(__name__)


class Source(Protocol):
    """What a worker needs of a `Task`."""

    def epoch(self, epoch: int, ranks: int) -> Sequence[Tensors]:
        """See `Task.epoch`."""


def made(batches: Sequence[Tensors], epoch: int, index: int) -> Tensors:
    """Make one of an epoch's batches.

    Raises:
        SlipwayError: as the task raised it, with the batch before its message.
        RuntimeError: any other exception of the task, with the batch and its traceback.
    """
    try:
        return batches[index]
    except Exception as error:
        where = f"batch {index} of epoch {epoch}"
        if isinstance(error, SlipwayError):
            raise type(error)(f"{where}: {error}") from error
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}\n{traceback.format_exc()}") from error


class Worker:
    """A process with a source of its own, seen from its rank; for one thread at a time. One that dies is replaced."""

    def __init__(self, task: Callable[[], Source]) -> None:
        self._task = task
        self._free: deque[int] = deque()  # slots that nobody reads; its append may come from any thread
        self._memory: dict[int, mmap.mmap] = {}
        self._process: ForkServerProcess | None = None
        self._pipe: Connection | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the process and wait until its task is made.

        Raises:
            SlipwayError, RuntimeError: as making the task raised it.
            TransientError: the process was killed again and again.
        """
        self._persist(lambda: None, "the start")

    def batch(self, epoch: int, ranks: int, index: int) -> Tensors:
        """Have batch `index` of `Task.epoch(epoch, ranks)` made.

        Its arrays lie in shared memory, which is used again when nothing refers to any of them any more.

        Raises:
            SlipwayError, RuntimeError: as `made` raised it in the process.
            TransientError: the process was killed over this batch again and again.
        """
        batch: Tensors = self._persist(lambda: self._ask(epoch, ranks, index), f"batch {index} of epoch {epoch}")
        return batch

    def close(self) -> None:
        """End the process, whatever it is doing; a call of `batch` that waits for it raises. From any thread."""
        self._closed.set()
        if self._process is not None:
            self._process.kill()
            self._process.join(GRACE_S)

    def _persist(self, attempt: Callable[[], Any], what: str) -> Any:
        for _ in range(TRIES):
            try:
                if self._pipe is None:
                    self._start()
                return attempt()
            except (EOFError, ConnectionError):
                cause = self._bury()
                if self._closed.is_set():
                    break
                log.warning("a data worker ended with %s at %s; another one takes over", cause, what)
        raise TransientError(
            f"train.loader: {what}: {TRIES} data workers were killed over it (out of memory?); "
            "lower train.loader.max_workers or train.batch_size"
        )

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipe, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, self._task), daemon=True)
        process.start()
        other.close()  # the process holds the only other end: its death is the end of the stream
        self._process = process
        if self._closed.is_set():  # before there was a process to kill
            process.kill()
        self._received()

    def _bury(self) -> str:
        assert self._process is not None
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = None
        self._process.join(GRACE_S)
        return processes.cause(self._process.exitcode)

    def _ask(self, epoch: int, ranks: int, index: int) -> Tensors:
        assert self._pipe is not None
        slot = self._free.popleft() if self._free else len(self._memory)
        try:
            self._pipe.send((epoch, ranks, index, slot))
            layout, size = self._received()
            if size:
                descriptor = reduction.recv_handle(self._pipe)
                self._memory[slot] = mmap.mmap(descriptor, size)
                os.close(descriptor)
        except BaseException:
            if slot in self._memory:
                self._free.append(slot)
            raise
        return self._lent(slot, layout)

    def _received(self) -> Any:
        assert self._pipe is not None
        failed, answer = self._pipe.recv()
        if failed:
            raise answer
        return answer

    def _lent(self, slot: int, layout: Layout) -> Tensors:
        whole = np.frombuffer(self._memory[slot], dtype=np.uint8)  # the base of every array, and of every tensor on it
        weakref.finalize(whole, self._free.append, slot).atexit = False
        return _arrays(whole, layout)


def _arrays(whole: Array, layout: Layout) -> dict[str, Array]:
    arrays = {}
    for name, dtype, shape, at in layout:
        kind = np.dtype(dtype)
        arrays[name] = whole[at : at + math.prod(shape) * kind.itemsize].view(kind).reshape(shape)
    return arrays


def _layout(batch: Tensors) -> tuple[Layout, int]:
    """Where each array of a batch lies in its slot, and how large that has to be."""
    layout, end = [], 0
    for name, array in batch.items():
        if array.dtype.hasobject:
            raise TypeError(f"{name}: arrays of Python objects cannot be shared; give numbers")
        layout.append((name, array.dtype.str, array.shape, end))
        end += -(-array.nbytes // ALIGNED) * ALIGNED
    return layout, end


def _serve(pipe: Connection, task: Callable[[], Source]) -> None:
    """Live and die as one worker."""
    commands.end_with_caller()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the rank ends its workers
    try:
        own = task()
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # the other cores belong to other workers
        pipe.send((False, None))
        slots: dict[int, mmap.mmap] = {}
        at: tuple[int, int] | None = None
        while True:
            epoch, ranks, index, slot = pipe.recv()
            if at != (epoch, ranks):
                at, batches = (epoch, ranks), own.epoch(epoch, ranks)
            _answer(pipe, slots, slot, batches, epoch, index)
    except (EOFError, ConnectionError):
        return
    except SlipwayError as error:
        pipe.send((True, error))
    except Exception as error:  # noqa: BLE001  # whatever it was, the rank is told
        pipe.send((True, RuntimeError(f"a data worker: {type(error).__name__}: {error}\n{traceback.format_exc()}")))


def _answer(
    pipe: Connection, slots: dict[int, mmap.mmap], slot: int, batches: Sequence[Tensors], epoch: int, index: int
) -> None:
    try:
        batch = made(batches, epoch, index)
        layout, size = _layout(batch)
    except (SlipwayError, RuntimeError, TypeError) as error:
        pipe.send((True, error))
        return
    descriptor, room = None, len(slots[slot]) if slot in slots else 0
    if slot not in slots or room < size:
        # A power of two, so that a slot grows rarely; what is not written to costs no memory.
        room = max(mmap.PAGESIZE, 1 << (size - 1).bit_length())
        descriptor = os.memfd_create("slipway-batch")
        os.ftruncate(descriptor, room)
        slots[slot] = mmap.mmap(descriptor, room)
    for name, target in _arrays(np.frombuffer(slots[slot], dtype=np.uint8), layout).items():
        np.copyto(target, batch[name])
    pipe.send((False, (layout, room if descriptor is not None else 0)))
    if descriptor is not None:
        reduction.send_handle(pipe, descriptor, None)
        os.close(descriptor)
