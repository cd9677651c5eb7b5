"""What a request costs in the model server, beside the engine alone and a naive peer: `python -m benchmarks.serving`.

One interleaved run on the loopback interface, about 30 s. Closed loop: each of 32 connections sends its next request
when the last one is answered, so requests/s is what the two processes reach on this machine together; the processor's
time a request is the server's alone and bears a busy machine better. The limit is ONNX Runtime by itself, one thread,
on batches of the size that the server formed. Writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from slipway import artifacts
from slipway.serving import model as models
from slipway.serving.model import Model
from tests.conftest import ROOT, free_port
from tests.serving import packages

RESULTS = Path(__file__).parent / "results" / "serving.json"
BUILT = Path("models/package")
CONNECTIONS = 32
ROUNDS = 4


@dataclass
class Side:
    """What was measured of one side, a figure a round."""

    rates: list[float] = field(default_factory=list)
    """Requests/s."""
    costs: list[float] = field(default_factory=list)
    """µs of processor time a request."""


def main() -> None:
    """Measure all sides in turn, print the table, keep the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--package", type=Path, help=f"a ranker's package (default: {BUILT}, else a small one made now)"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the run (default: %(default)s)")
    parser.add_argument("--naive", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.naive:
        serve_naively(options.package, options.naive)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.package or (BUILT if BUILT.exists() else packages.seal(Path(scratch), items=2000, width=64))
        report(folder, measure(folder, options.seconds))


def measure(folder: Path, seconds: float) -> tuple[dict[str, Side], list[float]]:
    """Run the rounds; gives the sides by name, and the mean batch of the server in each round."""
    model = models.load(folder, "1", threads=1)
    requests = list(bodies(folder, 500))
    naive = importlib.util.find_spec("fastapi") is not None
    slot = seconds / ROUNDS / (2.5 if naive else 1.5)
    sides = {"slipway": Side(), "engine alone": Side()} | ({"naive FastAPI": Side()} if naive else {})
    batches = []
    ours = ["-m", "slipway.serving", "--package", str(folder), "--version", "1", "--port"]
    peer = ["-m", "benchmarks.serving", "--package", str(folder), "--naive"]
    with server(ours) as (port, pid):
        for _ in range(ROUNDS):
            before = batch_counts(port)
            load(port, pid, requests, slot, sides["slipway"])
            samples, runs = (now - then for now, then in zip(batch_counts(port), before, strict=True))
            batches.append(samples / runs)
            engine_alone(model, requests, round(samples / runs), slot / 2, sides["engine alone"])
            if naive:
                with server(peer) as (peer_port, peer_pid):
                    load(peer_port, peer_pid, requests, slot, sides["naive FastAPI"])
    return sides, batches


def bodies(folder: Path, count: int) -> Iterator[bytes]:
    """Whole HTTP requests with histories of 5 to 50 items."""
    keys = artifacts.read_json(folder / "items.json")["keys"]
    random = np.random.default_rng(0)
    for _ in range(count):
        history = [keys[i] for i in random.integers(0, len(keys), size=random.integers(5, 51))]
        body = json.dumps({"history": history, "k": 10}).encode()
        yield (
            b"POST /v1/recommend HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            + (b"Content-Length: %d\r\n\r\n" % len(body))
            + body
        )


@contextmanager
def server(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Run a server on a free port until the block ends; gives its port and process id."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLIPWAY_LOG": "WARNING"}
    process = subprocess.Popen([sys.executable, *command, str(port)], cwd=ROOT, env=environment)
    try:
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                break
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(15)


class Client(asyncio.Protocol):
    """One connection of the closed loop."""

    def __init__(self, requests: Iterator[bytes], deadline: float) -> None:
        self._requests, self._deadline = requests, deadline
        self._buffer = b""
        self.answered = self.failed = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        """Count an answer once it is whole, and send the next request."""
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]):
            return
        self._buffer = b""
        self.answered += 1
        self.failed += not head.startswith(b"HTTP/1.1 200")
        if time.monotonic() < self._deadline:
            self._transport.write(next(self._requests))
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, wished for or not."""
        self.failed += exc is not None
        self.done.set_result(None)


def load(port: int, pid: int, requests: Sequence[bytes], seconds: float, side: Side) -> None:
    """Load a server and note what it did."""

    async def closed_loop(length: float) -> tuple[int, int]:
        loop, turn = asyncio.get_running_loop(), itertools.cycle(requests)
        deadline = time.monotonic() + length
        made = [
            await loop.create_connection(lambda: Client(turn, deadline), "127.0.0.1", port) for _ in range(CONNECTIONS)
        ]
        clients = [client for _, client in made]
        await asyncio.gather(*(client.done for client in clients))
        return sum(client.answered for client in clients), sum(client.failed for client in clients)

    uvloop.run(closed_loop(0.3))  # warm
    began, cost = time.monotonic(), processor_seconds(pid)
    answered, failed = uvloop.run(closed_loop(seconds))
    if failed:
        raise SystemExit(f"{failed} of {answered} requests failed")
    side.costs.append(1e6 * (processor_seconds(pid) - cost) / answered)
    side.rates.append(answered / (time.monotonic() - began))


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def batch_counts(port: int) -> tuple[float, float]:
    """Samples and runs of the engine so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    return float(lines["slipway_batch_size_sum"]), float(lines["slipway_batch_size_count"])


def engine_alone(model: Model, requests: Sequence[bytes], size: int, seconds: float, side: Side) -> None:
    """Run the engine on ready-made batches."""
    queries = [model.endpoint.decode(request.partition(b"\r\n\r\n")[2]) for request in requests]
    feeds = [model.endpoint.collate(queries[i : i + size]) for i in range(0, len(queries) - size + 1, size)]
    model.engine.run(feeds[0], model.endpoint.outputs)
    began, cost, samples = time.monotonic(), time.process_time(), 0
    for feed in itertools.cycle(feeds):
        model.engine.run(feed, model.endpoint.outputs)
        samples += size
        if time.monotonic() - began > seconds:
            break
    side.costs.append(1e6 * (time.process_time() - cost) / samples)
    side.rates.append(samples / (time.monotonic() - began))


def report(folder: Path, measured: tuple[dict[str, Side], list[float]]) -> None:
    """Print and keep the medians."""
    sides, batches = measured
    limit = statistics.median(sides["engine alone"].costs)
    mean_batch = statistics.mean(batches)
    table = Table(title=f"A request in the model server (medians of {ROUNDS} rounds, mean batch {mean_batch:.1f})")
    for column in ("", "requests/s", "CPU µs a request", "over the limit"):
        table.add_column(column, justify="left" if not column else "right")
    rows: dict[str, Any] = {}
    for name, side in sides.items():
        rate, cost = statistics.median(side.rates), statistics.median(side.costs)
        rows[name] = {"rate_rps": round(rate, 1), "cost_us": round(cost, 1), "ratio_to_limit": round(cost / limit, 2)}
        table.add_row(name, f"{rate:,.0f}", f"{cost:,.0f}", f"{cost / limit:.2f}")
    Console().print(table)
    size = (folder / "model.onnx").stat().st_size
    artifacts.write_json(RESULTS, {"model_bytes": size, "mean_batch": round(mean_batch, 2), "sides": rows})


def serve_naively(folder: Path, port: int) -> None:
    """The peer: the same model and answer in FastAPI as tutorials write it, without batching."""
    import fastapi
    import pydantic
    import uvicorn

    model = models.load(folder, "1", threads=1)
    keys = artifacts.read_json(folder / "items.json")["keys"]
    ids = {key: number for number, key in enumerate(keys, 1)}
    app = fastapi.FastAPI()
    History = pydantic.create_model("History", history=(list[str], ...), k=(int, 10))  # noqa: N806  # a class

    def recommend(request: Any) -> Any:
        history = np.array([[ids[key] for key in request.history][-50:]])
        items, scores = model.engine.run({"history": history}, ["items", "scores"])
        ranked = zip(items[0][: request.k].tolist(), scores[0][: request.k].tolist(), strict=True)
        return {"items": [{"item": keys[number - 1], "score": score} for number, score in ranked]}

    recommend.__annotations__["request"] = History
    post = cast("Callable[[Callable[[Any], Any]], object]", app.post("/v1/recommend"))
    post(recommend)
    app.get("/v2/health/ready")(lambda: {"ready": True})
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
