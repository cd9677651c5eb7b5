"""Training processes of this machine: started together, ended together; the first error is the one that is told.

A process that dies, by an exception or by a signal, ends the others, on all nodes (rendezvous.py). If the caller itself
is killed, the processes end themselves. On one machine they meet through a file and talk over the loopback interface.
They are forked from a server that has imported torch and DeepSpeed once, which costs more than to train a small model.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from slipway import commands
from slipway.errors import SlipwayError, TransientError
from slipway.training.rendezvous import LOST_S, Link, Team

HEAVY = "slipway.training.engine"  # what the server imports
PR_SET_NAME = 15
GRACE_S = 5.0
SETTLE_S = 1.0  # after an error of one process: time for the death of another, which may be its cause, to show


def run(world_size: int, work: Callable[..., Any], *arguments: Any, team: Team | None = None) -> Any:
    """Call `work(rank, world_size, meeting, *arguments)` in this node's share of `world_size` processes.

    `work` and its arguments are pickled; `meeting` is a URL for `torch.distributed`. With a `team` the other nodes call
    this, too, and all return when the last process of all has ended.

    Returns: the answer of the first process here: rank 0 on the first node.

    Raises:
        SlipwayError: as a process raised it, on whichever node.
        TransientError: a process was killed, or a node is gone.
        RuntimeError: a process failed with any other exception; the message is its traceback.
    """
    team = team or Team()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([HEAVY])
    with tempfile.TemporaryDirectory(prefix="slipway-train-") as folder:
        meeting = team.meeting or (Path(folder) / "meeting").as_uri()
        ranks: dict[Connection, ForkServerProcess] = {}
        here = team.node.ranks(world_size)
        try:
            for rank in here:
                receiver, sender = context.Pipe(duplex=False)
                store = team.store if rank == 0 else None
                target = (sender, work, rank, world_size, meeting, _variables(rank, here, team), store, *arguments)
                process = context.Process(target=_main, args=target, name=f"rank {rank}")
                process.start()
                sender.close()  # the process holds the only other end: its death is the end of the stream
                ranks[receiver] = process
            return _gather(ranks, team)
        except Exception as error:
            verdict = team.conclude(error)  # before the others are ended: what they say of it would come first
            if verdict is None or verdict is error:
                raise
            raise verdict from error
        finally:
            _end(list(ranks.values()))


def _variables(rank: int, here: range, team: Team) -> dict[str, str]:
    """What a process finds in its environment, in the words of torchrun."""
    found = {"RANK": rank, "GROUP_RANK": team.node.rank, "LOCAL_RANK": rank - here[0], "LOCAL_WORLD_SIZE": len(here)}
    variables = {name: str(value) for name, value in found.items()}
    if team.meeting:
        variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch is not to make one: it would listen everywhere
    for library in ("GLOO", "NCCL"):
        name = f"{library}_SOCKET_IFNAME"
        wanted = (team.links and os.environ.get(name)) or team.interface
        variables |= {name: wanted} if wanted else {}
    return variables


class Held:
    """An open file that travels to the processes: a lock on it lasts until the caller and all of them are gone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], Held], tuple[Any]]:
        return _received, (reduction.DupFd(self.number),)


def _received(travelled: Any) -> Held:
    return Held(travelled.detach())


def _gather(ranks: dict[Connection, ForkServerProcess], team: Team) -> Any:
    """Wait until all have ended: the processes here, and on the first node the other nodes, each as if it were one."""
    answer: Any = None
    error: Exception | None = None
    first = team.node.rank == 0
    settle_s = SETTLE_S + (LOST_S if first and team.links else 0)
    waiting: list[Connection] = [*ranks, *team.links]
    while waiting != ([] if first else team.links):
        ready = wait(waiting, None if error is None else settle_s)
        if error is not None and not ready:
            break
        for source in ready:
            assert isinstance(source, Connection)
            failed, told = _heard(source, ranks, team)
            if failed and isinstance(told, SlipwayError):
                raise told
            if failed:  # perhaps because another one was killed in the midst of their talk
                error = error or told
            elif told is not None:
                answer = told
            waiting.remove(source)
    error = error or team.conclude()
    if error is not None:
        raise error
    return answer


def _heard(source: Connection, ranks: dict[Connection, ForkServerProcess], team: Team) -> tuple[bool, Any]:
    """Whether a process or a node failed, and its error, or the answer of the first process here."""
    if isinstance(source, Link):
        error = team.hear(source)
        return error is not None, error
    process = ranks[source]
    try:
        failed, told = source.recv()
    except EOFError:
        process.join(GRACE_S)
        return True, TransientError(f"training: {process.name} ended with {cause(process.exitcode)}")
    return failed, told if failed or process is next(iter(ranks.values())) else None


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


def _main(
    sender: Connection,
    work: Callable[..., Any],
    rank: int,
    world: int,
    meeting: str,
    variables: dict[str, str],
    store: socket.socket | None,
    *rest: Any,
) -> None:
    """Live and die as one rank."""
    commands.end_with_caller()
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"slipway rank {rank}".encode())  # as `ps` and `top` show it
    os.environ.update(variables, WORLD_SIZE=str(world))
    commands.log_to_stderr("INFO" if rank == 0 else "ERROR")
    served = None if store is None else _serve(store)
    try:
        sender.send((False, work(rank, world, meeting, *rest)))
    except SlipwayError as error:
        sender.send((True, error))
    except Exception as error:  # noqa: BLE001  # whatever it was, it is told and the others are ended
        told = f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        sender.send((True, RuntimeError(told)))
    finally:
        del served


def _serve(store: socket.socket) -> Any:
    """Give the processes of all nodes the place where they meet, on the address that the socket is bound to alone."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # which it exports all the same

    host, port, *_ = store.getsockname()
    return TCPStore(host, port, None, True, wait_for_workers=False, master_listen_fd=store.detach())
