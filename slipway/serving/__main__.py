"""Serve one version of a model on the loopback interface: `python -m slipway.serving --model ranker/4 --port 18100`.

Live at once; ready once the package is verified and its golden outputs are reproduced; a corrupt one is refused with
exit code 2. SIGTERM: not ready, what was begun is finished, exit code 0.

environment:
  SLIPWAY_SERVE   JSON of the section `serve` of params.yaml (absent: its defaults)
  SLIPWAY_REDIS   path of Redis' unix socket, which keeps what was shown (absent: no feedback)
  SLIPWAY_STATE   path of another one's, which keeps users' histories (absent: every user is a newcomer)
  SLIPWAY_EVENTS  folder of the log of users' events (absent: none are taken)
  SLIPWAY_CACHE   unix sockets of the Redis servers that share the cache's third level, parted by commas (absent: none)
  SLIPWAY_HOME    the state folder, where fetched models are kept
  OTEL_EXPORTER_OTLP_ENDPOINT   URL of a collector that gets traces (absent: none are made)
  SLIPWAY_LOG     level of the log (INFO); SLIPWAY_LOG_FORMAT: text or json
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvloop
from pydantic import ValidationError

from slipway.errors import ParamsError, SlipwayError, StackError, TransientError
from slipway.params import ServeParams
from slipway.serving import logs
from slipway.serving import model as models
from slipway.serving.cache import Cache
from slipway.serving.edge import BACKLOG, Edge
from slipway.serving.feedback import Memory
from slipway.serving.metrics import Metrics
from slipway.serving.model import Model
from slipway.serving.server import App
from slipway.serving.state.personal import state_of
from slipway.serving.traces import Traces, wanted
from slipway.serving.warmup import warm_up

logger = logging.getLogger("slipway.serving")

HOST = "127.0.0.1"
SWITCH_S = 0.0001
"""In a flood the loop never rests, and the engine's thread waits so long for the interpreter after each step."""
ACCEPT_S = 0.3
"""A draining replica still accepts connections for a while: the gateway may not know yet."""


def main() -> int:
    """Parse the command line, serve until a signal; the exit code."""
    options = _parser().parse_args()
    sys.setswitchinterval(SWITCH_S)
    try:
        level, kind = os.environ.get("SLIPWAY_LOG", "INFO"), os.environ.get("SLIPWAY_LOG_FORMAT", "text")
        if kind not in logs.FORMATS:
            raise ParamsError(f"environment: SLIPWAY_LOG_FORMAT: expected {' or '.join(logs.FORMATS)}, got {kind!r}")
        logs.configure(level, kind, {"replica": f"{HOST}:{options.port}"})
        params, (label, load) = _params(), _source(options)
        uvloop.run(_serve(options.port, params, label, lambda: load(params)))
    except SlipwayError as error:
        print(f"serving: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slipway.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", metavar="WORKLOAD/REFERENCE", help="a version of the registry: ranker/4, ranker/champion"
    )
    source.add_argument("--package", type=Path, metavar="DIR", help="a model package's folder, with --version")
    parser.add_argument("--version", help="what the version of --package is called")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    return parser


def _params() -> ServeParams:
    try:
        return ServeParams.model_validate_json(os.environ.get("SLIPWAY_SERVE") or "{}")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ParamsError(f"environment: SLIPWAY_SERVE: {key}: {first['msg']} (got {first['input']!r:.80})") from error


def _source(options: argparse.Namespace) -> tuple[str, Callable[[ServeParams], Model]]:
    """Where the model comes from: the version as far as it is known, and what loads it."""
    if options.package is not None:
        if options.version is None:
            raise ParamsError("--package needs --version: what the version is called")
        _check_version(options.version)
        return options.version, lambda serve: models.load(options.package, options.version, serve.threads, serve.engine)
    if options.version is not None:
        raise ParamsError("--version goes with --package; --model names its version itself")
    workload, slash, reference = options.model.partition("/")
    if not (workload and slash and reference):
        raise ParamsError(f"--model: expected WORKLOAD/REFERENCE such as ranker/champion, got {options.model!r}")
    _check_version(reference)

    def load(serve: ServeParams) -> Model:
        from slipway import tracking

        version = tracking.resolve(workload, reference)
        return models.load(tracking.fetch(workload, version) / "package", version, serve.threads, serve.engine)

    return reference, load


def _check_version(version: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", version):  # it becomes a header and a part of a path
        raise ParamsError(f"version: expected letters, digits, dot, dash or underscore, got {version!r}")


async def _serve(port: int, params: ServeParams, label: str, load: Callable[[], Model]) -> None:
    began, listener = time.monotonic(), _listen(port)
    metrics = Metrics()
    socket_of_redis = os.environ.get("SLIPWAY_REDIS")
    memory = Memory(socket_of_redis, metrics.forgotten.inc) if socket_of_redis else None
    traces = Traces() if wanted() else None
    state = state_of(os.environ, params, metrics)
    caches: list[Cache] = []
    app = App(label, params, metrics, memory, traces, state, _caching(params, metrics, caches))
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    edge = Edge(app.begin, app.refuse, params.max_body_bytes)
    await edge.listen(listener)
    loading = asyncio.create_task(asyncio.to_thread(load))
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            model = loading.result()
            app.serve(model)
            await warm_up(HOST, port, model, params.max_batch, params.max_body_bytes)
            app.welcome()
            logger.info("ready: model=%s version=%s seconds=%.2f", model.name, model.version, time.monotonic() - began)
            died = asyncio.create_task(app.died())
            await asyncio.wait({died, stop}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise TransientError("the engine's thread died; the log says of what")
        logger.info("draining: at most %.0f s", params.drain_s)
        app.drain()
        edge.drain()
        await asyncio.sleep(ACCEPT_S)
    finally:
        await edge.close(params.drain_s)
        app.close()
        for part in (memory, state, *caches):
            if part is not None:
                await part.close()
        if traces is not None:
            traces.close()
    if not loading.done():
        os._exit(0)  # its thread cannot be interrupted, and nobody waits for its model any more


def _caching(params: ServeParams, metrics: Metrics, made: list[Cache]) -> Callable[[str], Cache] | None:
    """What makes the cache once the model is known; none if there is to be none."""
    if not params.cache.memory_mb:
        return None

    def make(model: str) -> Cache:
        shared = [socket for socket in os.environ.get("SLIPWAY_CACHE", "").split(",") if socket]
        cache = Cache(params.cache, model, os.environ.get("SLIPWAY_REDIS"), shared, metrics.cache)
        metrics.cache.watch_size(lambda: cache.memory.size_bytes)
        made.append(cache)
        return cache

    return make


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port), backlog=BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise StackError(f"port {port}: in use by another program; give another --port") from error


if __name__ == "__main__":
    sys.exit(main())
