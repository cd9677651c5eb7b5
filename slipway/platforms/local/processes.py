"""Processes and ports of this machine: who holds a port, which processes are the stack's own, how to end just those.

A process is the stack's own when its environment bears the stack's mark, or when it belongs to the session that
supervisord opened: nginx, Redis and Airflow write their titles over their environment, and a child may leave the
session, but none does both. A signal goes through a pidfd that was opened before the check, so that a pid which the
kernel gives to somebody else meanwhile is never hit.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "SLIPWAY_STACK"
_LISTENING = "0A"


@dataclass(frozen=True)
class Session:
    """The session that supervisord opened, told from a later one with the same number by time and boot."""

    leader: int
    start_time: int
    """Ticks after boot (field 22 of /proc/PID/stat)."""
    boot: str

    @classmethod
    def of(cls, pid: int) -> Session:
        """Describe the session that `pid` leads now."""
        return cls(pid, _stat(pid)[1], boot_id())

    def may_hold_members(self) -> bool:
        """False once the machine was booted again, or the leader's number belongs to another process."""
        if self.boot != boot_id():
            return False
        try:
            return _stat(self.leader)[1] == self.start_time
        except OSError:
            return True  # the leader is gone; while members live, the kernel does not give its number away


def boot_id() -> str:
    """Identify this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[int, int]:
    """Session and start time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[3]), int(fields[19])


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Say which process listens on a port: pid and command line, as far as this user may see."""
    sockets = {f"socket:[{inode}]" for inode in _listeners(port)}
    for pid in _pids():
        if any(target in sockets for target in _open_files(pid)):
            return f"pid {pid} ({command_line(pid)})"
    return "a process of another user"


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):  # it ended, or belongs to another user
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                yield str(link.readlink())


def _listeners(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in (line.split() for line in rows):
            if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port:
                yield row[9]


def command_line(pid: int) -> str:
    """Give the command line of a process, shortened."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended"
    return words[:120] or "?"


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208  # names alone, many times a second


def own(home: Path, session: Session | None) -> list[int]:
    """List the processes of the stack with this state folder, whoever their parent is now."""
    return [pid for pid in _pids() if pid != os.getpid() and _is_own(pid, home, session)]


def _is_own(pid: int, home: Path, session: Session | None) -> bool:
    folder = Path(f"/proc/{pid}")
    try:
        if folder.stat().st_uid != os.geteuid() or (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        if f"{MARK}={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
            return True
        return session is not None and _stat(pid)[0] == session.leader and session.may_hold_members()
    except OSError:  # it ended while we looked, or is none of our business
        return False


def end(home: Path, session: Session | None, grace_s: float) -> int:
    """End the stack's own processes: SIGTERM, after `grace_s` SIGKILL; how many there were."""
    found: set[int] = set()
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline + 5:
        with ExitStack() as stack:
            pids = _opened(stack, lambda pid: _is_own(pid, home, session))
            if not pids:
                break
            late = time.monotonic() > deadline
            for pid, descriptor in pids.items():
                if late or pid not in found:
                    _send(descriptor, signal.SIGKILL if late else signal.SIGTERM)
            found |= pids.keys()
        time.sleep(0.1)
    return len(found)


def await_end(pid: int, seconds: float) -> None:
    """Wait, for some time, until a process has ended, be its parent as late to take note as some containers' PID 1."""
    with ExitStack() as stack, suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        stack.callback(os.close, descriptor)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(seconds * 1000)


def _opened(stack: ExitStack, wanted: Callable[[int], bool]) -> dict[int, int]:
    opened = {}
    for pid in (pid for pid in _pids() if pid != os.getpid() and wanted(pid)):
        with suppress(OSError):
            descriptor = os.pidfd_open(pid)
            stack.callback(os.close, descriptor)
            if wanted(pid):  # still: what is open now is what was looked at
                opened[pid] = descriptor
    return opened


def _send(descriptor: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        if number == signal.SIGTERM:
            signal.pidfd_send_signal(descriptor, signal.SIGCONT)  # a stopped process could not hear it
        signal.pidfd_send_signal(descriptor, number)


def log_end(path: Path, lines: int) -> str:
    """Give the last lines of a log, indented."""
    try:
        text = path.read_text(errors="replace")[-20_000:]
    except OSError:
        return f"  ({path}: no log)"
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or f"  ({path}: empty)"
