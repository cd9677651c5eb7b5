"""Where the local stack keeps what: one folder of state, open to its owner alone.

stack.json           the checkout, interpreter and supervisord that `up` started; proves that the stack was begun
platform.json        routing and deployments: what the gateway serves, kept across power cuts
tokens.json          hashes of the clients' bearer tokens, if any are needed
events/              the log of users' events: Parquet files, which `ingest.source` may name, and journals
run/                 unix sockets and the lock of `up` and `down`
logs/PROGRAM.log     what each program says, bounded
supervisor/          supervisord's configuration; replicas/ holds one file a replica
gateway/ redis/ state/ prometheus/ alertmanager/ mlflow/ airflow/     each program's configuration and data
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipway import config
from slipway.errors import StackError
from slipway.params import CacheParams

_SOCKET_PATH_BYTES = 107  # what the kernel allows for the path of a unix socket
_SUPERVISOR_SUFFIX_BYTES = 9  # supervisord binds to PATH.PID first


@dataclass(frozen=True)
class Layout:
    """Paths under one state folder."""

    home: Path

    @property
    def run(self) -> Path:
        """Sockets and locks."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        """Logs, one a program."""
        return self.home / "logs"

    @property
    def stack_file(self) -> Path:
        """What `up` started."""
        return self.home / "stack.json"

    @property
    def platform_file(self) -> Path:
        """Routing and deployments."""
        return self.home / "platform.json"

    @property
    def tokens_file(self) -> Path:
        """Hashes of bearer tokens."""
        return self.home / "tokens.json"

    @property
    def supervisor_socket(self) -> Path:
        """XML-RPC of supervisord."""
        return self.run / "supervisor.sock"

    @property
    def gateway_socket(self) -> Path:
        """The gateway's admin server."""
        return self.run / "gateway.sock"

    @property
    def inner_socket(self) -> Path:
        """The service, for the product's own traffic: no TLS, no token, no limit."""
        return self.run / "service.sock"

    @property
    def redis_socket(self) -> Path:
        """Redis."""
        return self.run / "redis.sock"

    @property
    def state_socket(self) -> Path:
        """The Redis of users' histories."""
        return self.run / "state.sock"

    def cache_sockets(self, cache: CacheParams) -> list[Path]:
        """The Redis servers that share the cache's third level; none where there is no cache."""
        return [self.run / f"cache{number}.sock" for number in range(cache.nodes if cache.memory_mb else 0)]

    @property
    def events(self) -> Path:
        """The log of users' events."""
        return self.home / "events"

    @property
    def replicas(self) -> Path:
        """One configuration file a replica."""
        return self.home / "supervisor" / "replicas"

    @property
    def targets(self) -> Path:
        """What Prometheus scrapes beside the gateway."""
        return self.home / "prometheus" / "targets" / "replicas.json"

    def folder(self, program: str) -> Path:
        """Configuration and data of one program; made when it is asked for."""
        path = self.home / program
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def log(self, program: str) -> Path:
        """Log of one program."""
        return self.logs / f"{program}.log"

    def make(self) -> None:
        """Make the folders, open to their owner alone.

        Raises:
            StackError: the path is too long for a unix socket.
        """
        longest = len(str(self.supervisor_socket).encode()) + _SUPERVISOR_SUFFIX_BYTES
        if longest > _SOCKET_PATH_BYTES:
            spare = longest - _SOCKET_PATH_BYTES
            raise StackError(
                f"{self.home}: {spare} bytes too long for the unix sockets in it; "
                "move the checkout to a shorter path, or set SLIPWAY_HOME to one"
            )
        for folder in (self.home, self.run, self.logs, self.replicas, self.targets.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home.chmod(0o700)
        self.run.chmod(0o700)


def here() -> Layout:
    """Give the layout of the state folder in force."""
    return Layout(config.home())
