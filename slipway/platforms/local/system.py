"""The system programs that the stack runs: which are missing, and their installation through apt.

Debian starts and enables a service when it installs its package. None of that may happen here, nor may a running
service of the same name be restarted: while apt works, a policy forbids every start and restart (the file that Debian
asks, `policy-rc.d`), and what apt enabled for the next boot is disabled again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from slipway.errors import StackError
from slipway.platforms.local.gateway import MODULES
from slipway.platforms.local.programs import find

POLICY = Path("/usr/sbin/policy-rc.d")
_MARK = "# slipway: while packages are installed"
_TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """A Debian package and what shows that it is there."""

    name: str
    programs: Sequence[str] = ()
    """Any of them will do."""
    patterns: Sequence[str] = ()
    """Files, as patterns under the root; any of them will do."""
    service: str = ""
    """Unit that the package would enable."""

    def is_here(self) -> bool:
        """Whether the stack finds what it needs of the package."""
        found = any(find(program) for program in self.programs)
        return found or any(True for pattern in self.patterns for _ in Path("/").glob(pattern))


PACKAGES = (
    Package("nginx", ["nginx"], service="nginx"),
    Package("libnginx-mod-http-lua", patterns=[f"{str(MODULES)[1:]}/ngx_http_lua_module.so"]),
    Package("lua-cjson", patterns=["usr/lib/*/lua/5.1/cjson.so", "usr/local/lib/lua/5.1/cjson.so"]),
    Package("redis-server", ["redis-server"], service="redis-server"),
    Package("prometheus", ["prometheus"], service="prometheus"),
    Package("prometheus-alertmanager", ["prometheus-alertmanager", "alertmanager"], service="prometheus-alertmanager"),
)


def missing(wanted: Sequence[Package] = PACKAGES) -> list[Package]:
    """List the packages that are not here."""
    return [package for package in wanted if not package.is_here()]


def require() -> None:
    """Refuse to go on without the system programs.

    Raises:
        StackError: names the packages.
    """
    if packages := missing():
        raise StackError(f"not installed: {_names(packages)}; run `make setup`")


def install(wanted: Sequence[Package] = PACKAGES) -> None:
    """Install what is missing; nothing is asked, started, restarted or enabled.

    Raises:
        StackError: apt or the right to use it is missing, or apt failed; says what to install.
    """
    _restore()
    packages = missing(wanted)
    if not packages:
        return
    advice = f"install these packages, then go on: {_names(packages)}"
    if shutil.which("apt-get") is None:
        raise StackError(f"no apt-get on this machine: {advice}")
    root = _root(advice)
    print(f"installing {_names(packages)} (no service is started)", flush=True)
    apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1", "apt-get", "--quiet", "--quiet"]
    apt += ["-o", "DPkg::Lock::Timeout=120"]
    with _quiet_services(root):
        _run([*apt, "update"], "apt-get update", advice)
        _run([*apt, "install", "--yes", "--no-install-recommends", *(p.name for p in packages)], "apt-get", advice)
    services = [package.service for package in packages if package.service]
    if services and shutil.which("systemctl"):
        subprocess.run([*root, "systemctl", "--quiet", "disable", *services], capture_output=True, check=False)
    if still := missing(wanted):
        raise StackError(f"apt-get is done, but still missing: {_names(still)}")


def _names(packages: Sequence[Package]) -> str:
    return " ".join(package.name for package in packages)


def _root(advice: str) -> list[str]:
    """Give the words that make a command root's."""
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    if shutil.which("sudo") is None or subprocess.run([*sudo, "true"], capture_output=True, check=False).returncode:
        raise StackError(f"neither root nor sudo without a password: {advice} (sudo apt-get install …)")
    return sudo


def _run(command: Sequence[str], name: str, advice: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise StackError(f"{name} did not end within {_TIMEOUT_S} s: {advice}") from error
    if done.returncode:
        raise StackError(f"{name} failed: {done.stderr.strip()[-500:] or done.stdout.strip()[-500:]}\n{advice}")


@contextmanager
def _quiet_services(root: Sequence[str]) -> Iterator[None]:
    """Forbid Debian to start or restart services; a policy of the machine's own stays as it is."""
    if POLICY.exists():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that the policy goes whatever ends us
    try:
        script = f"#!/bin/sh\n{_MARK}\nexit 101\n"
        subprocess.run([*root, "tee", str(POLICY)], input=script, text=True, stdout=subprocess.DEVNULL, check=True)
        subprocess.run([*root, "chmod", "755", str(POLICY)], check=True)
        yield
    finally:
        subprocess.run([*root, "rm", "-f", str(POLICY)], check=False)
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def _restore() -> None:
    """Remove the policy that an earlier call left when it was killed."""
    if POLICY.exists() and _MARK in POLICY.read_text(errors="replace"):
        subprocess.run([*_root(f"remove {POLICY}"), "rm", "-f", str(POLICY)], check=False)
