"""supervisord, which keeps every program of the stack and every replica: its client and its configuration."""

from __future__ import annotations

import fcntl
import http.client
import shlex
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipway.errors import PlatformError, StackError
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.unix_http import UnixTransport

_TIMEOUT_S = 30.0
_ALREADY = {60, 70, 90}  # ALREADY_STARTED, NOT_RUNNING, ALREADY_ADDED: what was asked for holds


@dataclass(frozen=True)
class Program:
    """One process that supervisord keeps."""

    name: str
    command: Sequence[str]
    folder: Path
    """Working directory."""
    environment: Mapping[str, str] = field(default_factory=dict)
    start_at_once: bool = False
    """Start with supervisord, such as a replica after a power cut; else when asked."""
    stop_wait_s: float = 10.0
    """Time between the request to stop and SIGKILL."""
    stop_signal: str = "TERM"

    def section(self, layout: Layout) -> str:
        """Write the program's section of the configuration."""
        lines = [
            f"[program:{self.name}]",
            f"command={_escape(shlex.join(self.command))}",
            f"directory={_escape(str(self.folder))}",
            f"autostart={str(self.start_at_once).lower()}",
            "autorestart=true",
            "startretries=1000",
            f"stopsignal={self.stop_signal}",
            f"stopwaitsecs={int(self.stop_wait_s) + 1}",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={_escape(str(layout.log(self.name)))}",
            "stdout_logfile_maxbytes=5MB",
            "stdout_logfile_backups=1",
        ]
        if self.environment:
            pairs = ",".join(f"{key}={_quote(value)}" for key, value in sorted(self.environment.items()))
            lines.append(f"environment={pairs}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Process:
    """What supervisord says of one program."""

    name: str
    state: str
    """STOPPED STARTING RUNNING BACKOFF STOPPING EXITED FATAL."""
    pid: int
    """0: none."""
    started: int
    """Unix time of the last start (s)."""

    @property
    def alive(self) -> bool:
        """There is a process."""
        return self.state in {"STARTING", "RUNNING", "STOPPING"}


def configuration(layout: Layout, programs: Iterable[Program]) -> str:
    """Write supervisord's configuration, a file beside the folder of the replicas, which are included."""
    head = f"""[supervisord]
pidfile={_escape(str(layout.run / "supervisord.pid"))}
logfile={_escape(str(layout.log("supervisord")))}
logfile_maxbytes=2MB
logfile_backups=1
childlogdir={_escape(str(layout.logs))}
directory={_escape(str(layout.home))}
umask=077

[unix_http_server]
file={_escape(str(layout.supervisor_socket))}
chmod=0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[include]
files={layout.replicas.name}/*.conf

"""
    return head + "\n".join(program.section(layout) for program in programs)


def _escape(text: str) -> str:
    return text.replace("%", "%%")  # supervisord expands %(name)s


def _quote(text: str) -> str:
    sign = '"' if "'" in text else "'"
    return f"{sign}{_escape(text)}{sign}"


class Supervisor:
    """A client of supervisord; every call has its own short connection."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        transport = UnixTransport(layout.supervisor_socket, _TIMEOUT_S)
        self._proxy: Any = xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=transport, allow_none=True)

    def answers(self) -> bool:
        """Whether supervisord is there.

        Raises:
            StackError: it is there, yet says nothing: on no account may it be taken for gone.
        """
        try:
            self._proxy.supervisor.getState()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (OSError, http.client.HTTPException) as error:
            raise StackError(
                f"supervisord does not answer ({error!r}): is the machine overloaded? Try again"
            ) from error
        return True

    def pid(self) -> int:
        """The pid of supervisord."""
        return int(self._call("getPID"))

    def processes(self) -> dict[str, Process]:
        """Every program that supervisord knows, by name."""
        found = (
            Process(info["name"], info["statename"], info["pid"], info["start"])
            for info in self._call("getAllProcessInfo")
        )
        return {process.name: process for process in found}

    def reload(self) -> None:
        """Take over the configuration files: add, replace or remove what changed, and leave alone what did not."""
        with (self._layout.run / "supervisor.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            added, changed, removed = self._call("reloadConfig")[0]
            alive = [name for name, process in self.processes().items() if process.alive]
            for name in [*changed, *removed]:
                self.stop([name], 30.0)
                self._call("removeProcessGroup", name)
            for name in [*changed, *added]:
                self._call("addProcessGroup", name)
                if name in alive:
                    self.start(name)

    def start(self, name: str) -> None:
        """Begin to start a program; it may be running already."""
        self._call("startProcess", name, False)

    def stop(self, names: Sequence[str], timeout_s: float) -> None:
        """Stop programs, all at once, and wait until they ended.

        Raises:
            PlatformError: one is still there after `timeout_s`.
        """
        known = self.processes()
        for name in (name for name in names if name in known):
            self._call("stopProcess", name, False)
        deadline = time.monotonic() + timeout_s
        while still := [p for p in self.processes().values() if p.name in names and p.alive]:
            if time.monotonic() > deadline:
                raise PlatformError(f"did not stop within {timeout_s:.0f} s: {', '.join(p.name for p in still)}")
            for name in (process.name for process in still if process.state != "STOPPING"):
                self._call("stopProcess", name, False)  # who was about to start it did so after all
            time.sleep(0.05)

    def shutdown(self) -> None:
        """Tell supervisord to stop all programs and to end."""
        self._call("shutdown")

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode in _ALREADY:
                return None
            raise PlatformError(f"supervisord: {method}{arguments}: {fault.faultString}") from fault
        except (OSError, http.client.HTTPException) as error:
            raise StackError(
                f"supervisord is silent on {self._layout.supervisor_socket} ({error}); start the stack with `make up`"
            ) from error
