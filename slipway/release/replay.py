"""Live traffic from held-out samples: what a canary, a chaos experiment or a benchmark is watched under.

An open loop: the moments of sending are a Poisson process drawn beforehand from a seed, so a slow service gets no rest,
and a latency counts from the moment a request was due, not from the one it got away. The generator measures its own
lag too and tells it: figures with a lag near their latencies are worth nothing.

Reads the samples that travel with a version, `replay.jsonl`, a JSON object a line: {"user", "request", "truth"}.
Sends each as its user, and a moment later, as the user's choice, the item that truly came next.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from slipway import tracking
from slipway.errors import DataError, PlatformError
from slipway.workloads import base

FEEDBACK_PATH = "/v1/feedback"
TIMEOUT_S = 5.0
CONNECTIONS = 256

Sample = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What one request got, as its user saw it."""

    due_s: float
    """When it was to be sent, seconds after the start."""
    lag_ms: float
    """How much later the generator sent it."""
    latency_ms: float
    """From the moment it was due to the end of the answer."""
    status: int
    """HTTP status; 0: no answer."""
    version: str
    """Version that answered; empty without an answer."""
    track: str
    error: str
    """Why there is no answer, or what the service said instead of 200."""

    @property
    def failed(self) -> bool:
        """Did the user get nothing? Every sample is a valid request, so anything but 200 is a failure."""
        return self.status != 200


@dataclass(frozen=True)
class Figures:
    """What users saw in a period."""

    requests: int
    failed: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    lag_p99_ms: float
    """The generator's own lag, contained in the latencies."""
    service_p99_ms: float
    """P99 without that lag: from the moment a request was really sent."""

    @property
    def failed_ratio(self) -> float:
        """0..1; 0 without requests."""
        return self.failed / self.requests if self.requests else 0.0


def samples(workload: str, version: str) -> tuple[str, list[Sample]]:
    """Read a version's held-out samples, and the path that they are sent to.

    Raises:
        RegistryError: no such version.  DataError: its replay.jsonl is missing or torn; names file and line.
    """
    folder = tracking.fetch(workload, version)
    path: str = base.part(workload, "schema").ENDPOINT(folder / "package").path
    return path, read(folder / "replay.jsonl")


def read(path: Path) -> list[Sample]:
    """Read and check a replay.jsonl."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; register the version again")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            sample = json.loads(line)
            found.append({key: sample[key] for key in ("user", "request", "truth")})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a sample ({error}); register the version again") from error
    if not found:
        raise DataError(f"{path}: holds no samples; register the version again")
    return found


class Replay:
    """Sends samples at a steady rate from a thread of its own, from `with` to the end of the block.

    The end waits for what is under way; feedback that is not due yet is then sent at once.
    """

    def __init__(
        self, url: str, path: str, samples: Sequence[Sample], rate_rps: float, seed: int = 0, feedback_s: float = 1.0
    ) -> None:
        self.answers: list[Answer] = []
        """In the order in which they came."""
        self.feedback_failed = 0
        """Feedback that the service did not take."""
        self._url, self._path, self._feedback_s = url, path, feedback_s
        self._schedule = _schedule(samples, rate_rps, seed)
        self._thread = threading.Thread(target=self._work, name="replay", daemon=True)
        self._stop = threading.Event()
        self._ending = asyncio.Event()
        self._error: BaseException | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=4 * TIMEOUT_S)
        if self._error is not None and kind is None:
            raise PlatformError(f"the replay of traffic broke off: {self._error!r}") from self._error

    def now_s(self) -> float:
        """Seconds since the start, the clock of `Answer.due_s`."""
        return time.monotonic() - self._began

    def figures(self, since_s: float = 0.0, until_s: float = math.inf) -> Figures:
        """Sum up the requests that were due in a period and have their answer."""
        answers = [a for a in self.answers.copy() if since_s <= a.due_s < until_s]
        latencies = sorted(a.latency_ms for a in answers)
        return Figures(
            requests=len(answers),
            failed=sum(a.failed for a in answers),
            p50_ms=quantile(latencies, 0.5),
            p99_ms=quantile(latencies, 0.99),
            max_ms=quantile(latencies, 1.0),
            lag_p99_ms=quantile(sorted(a.lag_ms for a in answers), 0.99),
            service_p99_ms=quantile(sorted(a.latency_ms - a.lag_ms for a in answers), 0.99),
        )

    def _work(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:  # noqa: BLE001  # it is raised again where the thread is joined
            self._error = error

    async def _run(self) -> None:
        url, connector = _reach(self._url)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
            watch = asyncio.create_task(self._watch())
            asks: set[asyncio.Task[None]] = set()
            for due_s, sample in self._schedule:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), max(0.0, due_s - self.now_s()))
                if self._ending.is_set():
                    break
                ask = asyncio.create_task(self._ask(session, due_s, sample))
                asks.add(ask)
                ask.add_done_callback(asks.discard)
            await watch
            await asyncio.gather(*asks)

    async def _watch(self) -> None:
        while not self._stop.is_set():
            await asyncio.sleep(0.02)
        self._ending.set()

    async def _ask(self, session: aiohttp.ClientSession, due_s: float, sample: Sample) -> None:
        user, lag_ms = {"X-User": sample["user"]}, (self.now_s() - due_s) * 1e3
        status, version, track, error, shown = 0, "", "", "", None
        try:
            async with session.post(self._path, json=sample["request"], headers=user) as response:
                body = await response.read()
                status = response.status
                version, track = (response.headers.get(f"X-Slipway-{key}", "") for key in ("Version", "Track"))
                shown = json.loads(body).get("request_id") if status == 200 else None
                error = "" if status == 200 else body[:200].decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
            status, error = 0, f"{type(failure).__name__}: {failure}"
        latency_ms = (self.now_s() - due_s) * 1e3
        self.answers.append(Answer(due_s, lag_ms, latency_ms, status, version, track, error))
        if shown is not None:
            await self._feed_back(session, {"request_id": shown, "item": sample["truth"]}, user)

    async def _feed_back(self, session: aiohttp.ClientSession, choice: Sample, user: dict[str, str]) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), self._feedback_s)
        try:
            async with session.post(FEEDBACK_PATH, json=choice, headers=user) as response:
                self.feedback_failed += response.status >= 400
        except (aiohttp.ClientError, TimeoutError):
            self.feedback_failed += 1


def _reach(url: str) -> tuple[str, aiohttp.BaseConnector]:
    """Part `unix:PATH` into a base URL and the way there; any other URL is its own."""
    scheme, _, path = url.partition(":")
    if scheme == "unix":
        return "http://slipway", aiohttp.UnixConnector(path, limit=CONNECTIONS)
    return url, aiohttp.TCPConnector(limit=CONNECTIONS)


def _schedule(samples: Sequence[Sample], rate_rps: float, seed: int) -> Iterator[tuple[float, Sample]]:
    """Draw moments and samples without end; every further round through the samples is made by new users."""
    draw = random.Random(seed)
    due_s = 0.0
    for lap in itertools.count() if rate_rps > 0 else ():
        for sample in draw.sample(samples, len(samples)):
            due_s += draw.expovariate(rate_rps)
            user = f"{sample['user']}~{lap}" if lap else str(sample["user"])
            request = {**sample["request"], "user": user} if "user" in sample["request"] else sample["request"]
            yield due_s, {"user": user, "request": request, "truth": sample["truth"]}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Nearest-rank quantile of rising values; 0 where there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
