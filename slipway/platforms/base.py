"""The one interface between a release and the world it runs in: replicas of a version, and who is served by which.

Replicas belong to a version of a model, and `Routing` says which version is the champion and which the canary. So a
promotion is one atomic statement, `route(Routing(champion="4"))`, and the version it replaces stays warm until it is
removed. A `Platform` is all that a stage ever sees.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


@dataclass(frozen=True)
class Routing:
    """Who is served by which version. Without a champion, everybody gets the canary."""

    champion: str | None = None
    canary: str | None = None
    canary_weight: float = 0.0
    """Share of users on the canary (0..1); a user stays on a track, and a higher weight only adds users."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.canary_weight <= 1.0:
            raise ValueError(f"canary weight must lie in 0..1, got {self.canary_weight}")


@dataclass(frozen=True)
class Replica:
    """One process that serves one version."""

    name: str
    version: str
    address: str
    """host:port of its HTTP server."""
    ready: bool
    pool: str = ""
    """Pool of params that it belongs to."""


@dataclass(frozen=True)
class Status:
    """What runs now."""

    routing: Routing
    replicas: Mapping[str, tuple[Replica, ...]] = field(default_factory=dict)
    """Replicas by version."""
    wanted: Mapping[str, int] = field(default_factory=dict)
    """How many a version was last asked to have, by version; holds for every pool that does not say itself."""


class Fault(StrEnum):
    """What chaos does to a replica."""

    KILL = "kill"
    """The process ends at once (SIGKILL)."""
    STALL = "stall"
    """The process keeps its sockets but answers nothing (SIGSTOP) until `heal`."""


class Platform(Protocol):
    """What a release asks of the world. Every call is idempotent and returns when it is in force."""

    @property
    def gateway_url(self) -> str:
        """Base URL of the service, such as http://127.0.0.1:18080."""

    @property
    def inner_url(self) -> str:
        """Where slipway's own traffic goes, without TLS, tokens and limits: a URL, or `unix:` and a socket's path."""

    @property
    def prometheus_url(self) -> str:
        """Base URL of the Prometheus that scrapes gateway and replicas."""

    def deploy(self, workload: str, version: str, replicas: int, timeout_s: float) -> None:
        """Bring up a version and wait until all replicas are ready; on failure none stays behind.

        `replicas` holds for every pool of params that does not say how many itself.

        Raises:
            PlatformError: a replica did not become ready; says why, with the end of its log. Or another workload is
                served here: versions are told apart by number alone.
        """

    def scale(self, version: str, replicas: int, timeout_s: float) -> None:
        """Give a version that serves another number of replicas: new ones are awaited, surplus ones drained.

        Raises:
            PlatformError: nothing of the version serves, or a new replica is not ready in time; then no new one stays.
        """

    def pools_in_use(self) -> Mapping[str, bool]:
        """Pools of realtime requests, and whether the rate asks for each or users are still on it.

        Raises:
            PlatformError: the gateway does not answer.
        """

    def let_sleep(self, version: str, pools: Collection[str], timeout_s: float) -> None:
        """Let exactly `pools` of a version that serves have no replicas: theirs are drained, all others awaited.

        Raises:
            PlatformError: nothing of the version serves, or a replica that woke is not ready in time; then none stays.
        """

    def remove(self, version: str) -> None:
        """Drain and end all replicas of a version; nothing to do is fine.

        Raises:
            PlatformError: the version is still routed to.
        """

    def route(self, routing: Routing) -> None:
        """Put `routing` in force, at once and without a failed request.

        Raises:
            PlatformError: a version has no ready replica, or the gateway does not answer.
        """

    def status(self) -> Status:
        """What runs now, as the platform sees it at this moment."""

    def inject(self, replica: Replica, fault: Fault) -> None:
        """Do `fault` to one replica (chaos experiments)."""

    def heal(self, replica: Replica) -> None:
        """End a `STALL`; a killed replica is restarted by the platform itself."""
