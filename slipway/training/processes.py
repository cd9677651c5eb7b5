"""Training processes of this machine: started together, ended together; the first error is the one that is told.

A process that dies, by an exception or by a signal, ends the others. If the caller itself is killed, the kernel ends
the processes. They meet through a file and talk over the loopback interface. They are forked from a server that has
imported torch and DeepSpeed once, which costs more than a small model's training.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from slipway.errors import SlipwayError, TransientError

HEAVY = "slipway.training.engine"  # what the server imports
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
GRACE_S = 5.0
SETTLE_S = 1.0  # after an error of one process: time for the death of another, which may be its cause, to show


def run(world_size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work(rank, world_size, meeting, *arguments)` in `world_size` processes; the answer of rank 0.

    `work` and its arguments are pickled; `meeting` is a URL for `torch.distributed`.

    Raises:
        SlipwayError: as a process raised it.
        TransientError: a process was killed.
        RuntimeError: a process failed with any other exception; the message is its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([HEAVY])
    with tempfile.TemporaryDirectory(prefix="slipway-train-") as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        ranks: dict[Connection, ForkServerProcess] = {}
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                target = (sender, work, rank, world_size, meeting, *arguments)
                process = context.Process(target=_main, args=target, name=f"rank {rank}")
                process.start()
                sender.close()  # the process holds the only other end: its death is the end of the stream
                ranks[receiver] = process
            return _gather(ranks)
        finally:
            _end(list(ranks.values()))


class Held:
    """An open file that travels to the processes: a lock on it lasts until the caller and all of them are gone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], Held], tuple[Any]]:
        return _received, (reduction.DupFd(self.number),)


def _received(travelled: Any) -> Held:
    return Held(travelled.detach())


def _gather(ranks: dict[Connection, ForkServerProcess]) -> Any:
    answers: dict[str, Any] = {}
    waiting = list(ranks)
    error: Exception | None = None
    while waiting:
        ready = wait(waiting, None if error is None else SETTLE_S)
        if error is not None and not ready:
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            process = ranks[receiver]
            try:
                failed, answer = receiver.recv()
            except EOFError:
                process.join(GRACE_S)
                raise TransientError(f"training: {process.name} ended with {cause(process.exitcode)}") from None
            if failed and isinstance(answer, SlipwayError):
                raise answer
            if failed:  # perhaps because another one was killed in the midst of their talk
                error = error or answer
            answers[process.name] = answer
            waiting.remove(receiver)
    if error is not None:
        raise error
    return answers["rank 0"]


def cause(code: int | None) -> str:
    """Tell how a process ended, from its exit code as multiprocessing gives it."""
    if code is not None and code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return signal.Signals(-code).name + hint
    return f"exit code {code}"


def _end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.join(0 if process.exitcode is None and sys.exc_info()[0] else GRACE_S)
        if process.is_alive():
            process.terminate()
            process.join(GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()


def end_with_server() -> None:
    """Have the kernel end this process with the server that it was forked from, which ends with the caller."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    caller = multiprocessing.parent_process()
    if caller is None or not caller.is_alive():  # it died before the line above
        os._exit(1)


def _main(sender: Connection, work: Callable[..., Any], rank: int, world: int, meeting: str, *rest: Any) -> None:
    """Live and die as one rank."""
    end_with_server()
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"slipway rank {rank}".encode())  # as `ps` and `top` show it
    os.environ.update(  # in the words of torchrun; this machine is one node
        RANK=str(rank),
        WORLD_SIZE=str(world),
        GROUP_RANK="0",
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        GLOO_SOCKET_IFNAME="lo",
        NCCL_SOCKET_IFNAME="lo",
    )
    logging.basicConfig(level="INFO" if rank == 0 else "ERROR", format="%(levelname)s %(name)s: %(message)s")
    try:
        sender.send((False, work(rank, world, meeting, *rest)))
    except SlipwayError as error:
        sender.send((True, error))
    except Exception as error:  # noqa: BLE001  # whatever it was, it is told and the others are ended
        told = f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        sender.send((True, RuntimeError(told)))
