"""Run a stage as a process of its own, its lines told as they come, and say how it ended.

What a stage reads beside its workspace travels in the environment, never in the command line: SLIPWAY_CONF (JSON),
SLIPWAY_HOME, SLIPWAY_RUN. A process of the same stage of the same run that a killed caller left behind is ended first.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from slipway import artifacts, config
from slipway.errors import DataError

GRACE_S = 15.0  # time in which a stage that is told to end can put its files in order
TAIL = 20

NOISY = ("DeepSpeed", "httpx", "urllib3", "great_expectations", "alembic", "mlflow", "matplotlib", "torch")
# What they warn of is no user's to mend: kernels for other machines, a call that another library still makes.
MISTAKEN = ("torchao", "torch.utils._pytree")

_EXITED = re.compile(r"exited with (-?\d+)")  # how DVC tells the exit code of a stage's command
# What DVC advises to do by hand is done when the run closes; in a task's log it would mislead.
_ADVICE = re.compile(r"To track the changes with git|To enable auto staging|Use `dvc push`|\s+git add |\s+dvc config ")
_RESTORED = re.compile(r"is cached - skipping run|didn't change, skipping")


def log_to_stderr(level: str) -> None:
    """Have this process log to stderr, and the libraries under it only what a user has to know."""
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for names, least in ((NOISY, logging.WARNING), (MISTAKEN, logging.ERROR)):
        for name in names:
            logging.getLogger(name).setLevel(least)


def end_with_caller() -> None:
    """Have this process killed when its caller dies, whatever it is in the midst of.

    A pool does not see it while it waits for work. Not by the kernel (PR_SET_PDEATHSIG): for it the parent of what a
    forkserver makes is that server, and that outlives the caller, because every process keeps open what tells the
    server that it is still needed.
    """
    caller = multiprocessing.parent_process()
    assert caller is not None

    def watch() -> None:
        caller.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="caller", daemon=True).start()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a SIGTERM, which would end Python on the spot, interrupt the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


@dataclass
class Outcome:
    """How a stage ended."""

    code: int
    """Exit code of the stage itself; negative: the signal that ended it."""
    ran: bool
    """Whether its command ran; DVC may have restored its results instead, or failed before."""
    tail: list[str] = field(default_factory=list)
    """Its last lines."""


class Command:
    """One stage in one workspace."""

    def __init__(self, stage: str, folder: Path, run: str) -> None:
        self._stage, self._folder, self._run = stage, folder, run
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, arguments: Sequence[str], conf: Mapping[str, Any], say: Callable[[str], None], **extra: str
    ) -> Outcome:
        """Run `python ARGUMENTS` in the workspace until it ends.

        Args:
            arguments: what the interpreter is called with, such as -m tasks.deploy.
            conf: what `stage.conf()` gives to the stage.
            say: called with every line that it prints, at once.
            extra: more of its environment.
        """
        end_left_over(self._run, self._stage)
        command = [sys.executable, *arguments]
        with subprocess.Popen(
            command,
            cwd=self._folder,
            env=self._environment(conf) | extra,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as self._process:
            tail = self._listen(self._process, say)
            code = self._process.wait()
        return _outcome(code, tail)

    def _listen(self, process: subprocess.Popen[str], say: Callable[[str], None]) -> list[str]:
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                text = line.rstrip()
                if text and not _ADVICE.match(text):
                    say(text)
                    lines = [*lines[-TAIL:], text]
        except BaseException:
            self.end()
            raise
        return lines

    def _environment(self, conf: Mapping[str, Any]) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(self._folder),
            "PYTHONUNBUFFERED": "1",
            "SLIPWAY_HOME": str(config.home()),
            "SLIPWAY_CONF": json.dumps(conf),
            "SLIPWAY_RUN": self._run,
            "SLIPWAY_STAGE": self._stage,
        }

    def end(self) -> None:
        """End the stage and all that it started."""
        if self._process is not None and self._process.poll() is None:
            _end_groups({self._process.pid})

    def message(self, outcome: Outcome) -> str:
        """Say in one line why the stage failed: what its report tells, else the last line that it printed."""
        if outcome.code < 0:
            return f"{self._stage}: ended by {signal.Signals(-outcome.code).name}"
        with suppress(DataError):
            report = artifacts.read_json(self._folder / "reports" / f"{self._stage}.json")
            if report.get("status") == "failed" and outcome.ran:
                return f"{self._stage}: {report.get('error')}"
        last = next((line for line in reversed(outcome.tail) if line.strip()), "it printed nothing")
        return f"{self._stage}: exit code {outcome.code}: {last}"


def _outcome(code: int, tail: list[str]) -> Outcome:
    if code == 0:
        return Outcome(0, not any(_RESTORED.search(line) for line in tail), tail)
    told = [match for line in tail if (match := _EXITED.search(line))]
    if told:  # DVC's own exit code says nothing of the stage's
        return Outcome(_signalled(int(told[-1].group(1))), True, tail)
    return Outcome(code, not any(line.startswith("ERROR:") for line in tail), tail)


def _signalled(code: int) -> int:
    # DVC runs a command through $SHELL: one that does not replace itself tells of a signal as 128 + its number.
    return 128 - code if code - 128 in set(signal.Signals) else code


def end_left_over(run: str, stage: str) -> None:
    """End processes of a stage of a run whose caller was killed: they would hold its lock and write its files."""
    wanted = {f"SLIPWAY_RUN={run}".encode(), f"SLIPWAY_STAGE={stage}".encode()}
    groups = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is not ours to read
            if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                groups.add(os.getpgid(int(entry.name)))
    _end_groups(groups - {os.getpgid(0)})


def _end_groups(groups: set[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, number)
        limit = time.monotonic() + GRACE_S
        while groups and time.monotonic() < limit:
            groups = {group for group in groups if _lives(group)}
            time.sleep(0.05)


def _lives(group: int) -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False
