"""The programs of the local stack: how each is started, where it answers, and how to see that it is well."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import socket
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jinja2

from slipway import artifacts, config, loopback
from slipway.errors import PlatformError, SlipwayError
from slipway.params import Params
from slipway.platforms.local import airflow, gateway
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.supervisor import Program

HOST = "127.0.0.1"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_HEALTH_TIMEOUT_S = 2.0
NOTHING: Mapping[Path, str] = {}
_HEAVY_START_S = 600.0  # they import for half a minute of processor time, maybe on a machine that has none to spare


@dataclass(frozen=True)
class Service:
    """A program of the stack with its address."""

    program: Program
    address: str
    """URL, or path of a unix socket; empty: it only works for others."""
    healthy: Callable[[], bool]
    ports: Mapping[str, int]
    """Ports that it listens on, by their key in params.yaml."""
    start_s: float = 20.0
    """Longest time from start to health on a busy machine."""
    files: Mapping[Path, str] = field(default_factory=dict)
    """Its configuration, which `up` writes: to describe a program, as the status does, changes nothing."""
    late: bool = False
    """Needed by nobody at first: started after the others are well, and not waited for."""

    @property
    def name(self) -> str:
        """Name of the program."""
        return self.program.name


def find(program: str) -> str | None:
    """Find a system program, on the user's path or where administrators' programs lie."""
    return shutil.which(program) or shutil.which(program, path=PATH)


def all_of(layout: Layout, checkout: Path, python: str, params: Params) -> dict[str, Service]:
    """Describe every program of the stack, by name, in the order of their start."""
    services = [
        _redis(layout),
        _state(layout),
        *_cache_nodes(layout, params),
        _gateway(layout, checkout, params),
        _prometheus(layout, checkout, params),
        _alertmanager(layout, checkout, params),
        _mlflow(layout, python, params),
        _page(layout, checkout, python, params),
        *_autoscaler(checkout, python, params),
        *_airflow(layout, checkout, python, params),
    ]
    return {service.name: service for service in services}


def _redis(layout: Layout) -> Service:
    # What it holds, who was shown what, is worth nothing after a power cut.
    return _redis_server(layout, "redis", layout.redis_socket, "256mb", "allkeys-lru")


def _cache_nodes(layout: Layout, params: Params) -> list[Service]:
    """Redis once more, some of it: each holds its share of the cache's third level, which may be lost at any time."""
    sockets = layout.cache_sockets(params.serve.cache)
    return [_redis_server(layout, path.stem, path, "128mb", "allkeys-lfu") for path in sockets]


def _state(layout: Layout) -> Service:
    """Redis again, for what must not be lost: users' histories. It refuses before it forgets."""
    return _redis_server(layout, "state", layout.state_socket, "512mb", "noeviction", lasting=True)


def _redis_server(layout: Layout, name: str, path: Path, memory: str, policy: str, lasting: bool = False) -> Service:
    command = [find("redis-server") or "redis-server", "--port", "0", "--unixsocket", str(path)]
    command += ["--unixsocketperm", "600", "--daemonize", "no", "--maxmemory", memory, "--maxmemory-policy", policy]
    command += ["--save", "", "--appendonly", "yes" if lasting else "no", "--appendfsync", "everysec"]
    service = Service(Program(name, command, layout.folder(name)), str(path), partial(_redis_answers, path), {})
    return replace(service, start_s=60.0) if lasting else service  # it reads what it has written


def _redis_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_HEALTH_TIMEOUT_S)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _gateway(layout: Layout, checkout: Path, params: Params) -> Service:
    folder = layout.folder("gateway")
    (folder / "temp").mkdir(exist_ok=True)
    file, text = folder / "nginx.conf", gateway.render(layout, checkout, params)
    nginx = [find("nginx") or "nginx", "-p", f"{folder}/", "-c", str(file), "-e", "stderr"]
    # nginx does not take over a unix socket that a killed one left.
    sockets = [str(layout.gateway_socket), str(layout.inner_socket)]
    command = ["/bin/sh", "-c", 'rm -f "$1" "$2"; shift 2; exec "$@"', "sh", *sockets, *nginx]
    revision = _code(checkout / "infra" / "nginx") | _revision(text + gateway.revision(params))
    program = Program("gateway", command, folder, revision, stop_signal="QUIT")
    ports = {"stack.gateway_port": params.stack.gateway_port, "stack.metrics_port": params.stack.metrics_port}

    def healthy() -> bool:
        try:
            gateway.state(layout)
        except PlatformError:
            return False
        return True

    return Service(program, gateway.url(params), healthy, ports, files={file: text})


def _prometheus(layout: Layout, checkout: Path, params: Params) -> Service:
    folder, port = layout.folder("prometheus"), params.stack.prometheus_port
    rules = checkout / "infra" / "prometheus" / "rules"
    values = {**params.stack.model_dump(), "autoscales": params.autoscales, "targets": layout.targets, "rules": rules}
    text = _template(checkout / "infra" / "prometheus" / "prometheus.yml.j2", values)
    command = [find("prometheus") or "prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={HOST}:{port}", "--log.level=warn"]
    command += ["--storage.tsdb.retention.time=3d", "--storage.tsdb.retention.size=512MB"]
    program = Program("prometheus", command, folder, _revision(text + artifacts.sha256(rules)))
    return _web(program, port, "stack.prometheus_port", "/-/ready", 60, {folder / "prometheus.yml": text})


def _alertmanager(layout: Layout, checkout: Path, params: Params) -> Service:
    folder, port = layout.folder("alertmanager"), params.stack.alertmanager_port
    values = {**params.stack.model_dump(), "autoscales": params.autoscales}
    text = _template(checkout / "infra" / "prometheus" / "alertmanager.yml.j2", values)
    command = [find("prometheus-alertmanager") or find("alertmanager") or "alertmanager"]
    command += [f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/data", "--log.level=warn"]
    # Without an empty cluster address it listens on all interfaces for others of its kind.
    command += [f"--web.listen-address={HOST}:{port}", "--cluster.listen-address="]
    program = Program("alertmanager", command, folder, _revision(text))
    return _web(program, port, "stack.alertmanager_port", "/-/ready", files={folder / "alertmanager.yml": text})


def _mlflow(layout: Layout, python: str, params: Params) -> Service:
    folder, port = layout.folder("mlflow"), params.stack.mlflow_port
    command = [python, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    # Its job runner, which nobody here uses, would import all of MLflow once more.
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    program = Program("mlflow", command, folder, environment)
    return _web(program, port, "stack.mlflow_port", "/health", start_s=_HEAVY_START_S)


def _page(layout: Layout, checkout: Path, python: str, params: Params) -> Service:
    port = params.stack.page_port
    command = [python, "-m", "slipway.monitor", "--port", str(port)]
    environment = config.hand(params) | _code(checkout / "slipway")
    return _web(Program("page", command, checkout, environment), port, "stack.page_port", "/", start_s=60)


def _autoscaler(checkout: Path, python: str, params: Params) -> list[Service]:
    if params.deploy.autoscaling is None or not params.autoscales:
        return []
    port, policy = params.stack.autoscaler_port, checkout / params.deploy.autoscaling
    command = [python, "-m", "slipway.scaling", "--port", str(port)]
    environment = config.hand(params) | {"SLIPWAY_LOG_FORMAT": "json"} | _code(checkout / "slipway")
    environment |= _revision(policy.read_text() if policy.is_file() else "")
    program = Program("autoscaler", command, checkout, environment)
    return [_web(program, port, "stack.autoscaler_port", "/health", start_s=60)]


def _airflow(layout: Layout, checkout: Path, python: str, params: Params) -> list[Service]:
    folder, port = layout.folder("airflow"), params.stack.airflow_port
    environment = airflow.environment(folder, checkout, params)
    services = []
    for name, arguments, part in airflow.PARTS:
        program = Program(name, [python, "-m", "airflow", *arguments], folder, environment, stop_wait_s=20)
        serves = part == "metadatabase"
        services.append(
            Service(
                program,
                f"http://{HOST}:{port}" if serves else "",
                partial(airflow.healthy, f"http://{HOST}:{port}", part),
                {"stack.airflow_port": port} if serves else {},
                start_s=_HEAVY_START_S,
                late=part == "triggerer",
            )
        )
    return services


def _web(
    program: Program, port: int, key: str, path: str, start_s: float = 20.0, files: Mapping[Path, str] = NOTHING
) -> Service:
    url = f"http://{HOST}:{port}"
    return Service(program, url, lambda: answers(url + path), {key: port}, start_s, files)


def answers(url: str, timeout_s: float = _HEALTH_TIMEOUT_S) -> bool:
    """Whether a URL gives status 200 now."""
    try:
        with loopback.urlopen(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):  # URLError and HTTPError are OSErrors; ValueError: not HTTP
        return False


def main(name: str, about: str | None, serve: Callable[[int, Params], None]) -> int:
    """Run a program of the stack that is a package of slipway: `serve` on its port, with the parameters of `up`.

    Gives the exit code: 130 for a signal, that of the error that the user must mend, otherwise 0.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m slipway.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True, help=f"port on {HOST}")
    port = parser.parse_args().port
    try:
        serve(port, config.handed())
    except SlipwayError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _template(path: Path, values: Mapping[str, object]) -> str:
    template = jinja2.Template(path.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return str(template.render(values))


def _code(folder: Path) -> dict[str, str]:
    """Let supervisord see that a program's code changed; Python's compiled form of it comes and goes by itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    text = "".join(f"{path.relative_to(folder)} {artifacts.sha256(path)}\n" for path in files)
    return {"SLIPWAY_REVISION": hashlib.sha256(text.encode()).hexdigest()[:12]}


def _revision(text: str) -> dict[str, str]:
    """Let supervisord see that a program's configuration file changed: only then it is started anew."""
    return {"SLIPWAY_CONFIGURATION": f"{zlib.crc32(text.encode()):08x}"}
