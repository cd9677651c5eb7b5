"""The workload's own endpoint: how long a request waits, what the model or the cache says, and the answer that is told.

A small body without a cache on the way, which is nearly every request, is answered by functions that call one another,
from the last byte to the answer: a task, its futures and its turns of the loop would cost more than all of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from slipway.errors import RequestError
from slipway.params import ServeParams
from slipway.serving.batching import Batcher, Outcome
from slipway.serving.cache import Cache
from slipway.serving.cache.entry import Entry
from slipway.serving.edge import Pending, Reply, Request, Response
from slipway.serving.feedback import Memory, Shown
from slipway.serving.metrics import Metrics
from slipway.serving.model import Model, Sample
from slipway.serving.reading import Reader
from slipway.serving.scores import Watch
from slipway.workloads.base import Query, Tensors

JSON = ((b"content-type", b"application/json"),)
OWN_PATIENCE = frozenset((b"x-deadline-ms", b"x-request-class"))
"""Headers of requests that do not wait as long as usual."""
_encode = msgspec.json.Encoder().encode

Headers = tuple[tuple[bytes, bytes], ...]


class Predictor:
    """Answers requests by one model; made and used on the event loop.

    Args:
        model: what answers.
        batcher: runs it.
        params: how long a request waits, and how many.
        metrics: hear of what is answered without a task.
        memory: keeps what was shown, for feedback.
        cache: keeps answers.
        headers: of every answer.
        failed: makes the response of an error that a request met.
    """

    def __init__(
        self,
        model: Model,
        batcher: Batcher[Sample, Tensors],
        params: ServeParams,
        metrics: Metrics,
        memory: Memory | None,
        cache: Cache | None,
        headers: Headers,
        failed: Callable[[Exception, Request, str], Response],
    ) -> None:
        self._endpoint, self._batcher, self._version = model.endpoint, batcher, model.version
        self._who = {"model": model.name, "version": model.version}
        self._metrics, self._memory, self._cache, self._failed = metrics, memory, cache, failed
        self._usual_s = params.deadline_ms / 1e3 or math.inf
        self._headers = (*headers, *JSON)
        self._scores = Watch(model.package.score_deciles, model.endpoint.outputs[-1], metrics.tenths)
        self._reader = Reader(model.endpoint, params.max_queue)
        self.path = model.endpoint.path
        self.label = self.path.rpartition("/")[2]  # such as recommend
        self.submit: Callable[[Sequence[Sample], float], Awaitable[Sequence[Tensors]]] = batcher.submit

    def close(self) -> None:
        """Read no more."""
        self._reader.close()

    def should_shed(self, request: Request) -> bool:
        """Would a request come too late in any case? Not where a cache may have its answer, or it waits otherwise."""
        usual = self._cache is None and OWN_PATIENCE.isdisjoint(request.headers)
        return usual and self._batcher.late(1, self._usual_s)

    def at_once(self, request: Request) -> bool:
        """May `begin` answer it?"""
        return self._cache is None and self._reader.quick(request.body)

    def begin(self, request: Request, reply: Reply) -> Response | Pending:
        """Answer one request that is not shed, by calls alone."""
        began = time.monotonic()

        def end(response: Response) -> Response:
            self._metrics.answered(self.label, response.status, time.monotonic() - began)
            return response

        def done(outcome: Outcome[Tensors]) -> None:
            if isinstance(outcome, Exception):
                response = self._failed(outcome, request, self.label)
            else:
                try:
                    response = self._told(query, outcome[0], {})
                except Exception as error:  # noqa: BLE001  # as below
                    response = self._failed(error, request, self.label)
            reply(end(response))

        try:
            patience_s = self._usual_s
            if not OWN_PATIENCE.isdisjoint(request.headers):
                patience_s = self._patience_s(request)
                self._batcher.admit(1, began + patience_s)
            query = self._endpoint.decode(request.body)
            return self._batcher.put((Sample(query, self._endpoint.outputs),), began + patience_s, done)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told
            return end(self._failed(error, request, self.label))

    async def predict(self, request: Request) -> Response:
        """Answer one request as `begin` does, but with a body that takes long to read, or a cache.

        Raises:
            RequestError, OverloadError, DeadlineError, TransientError: as they say.
        """
        deadline = self._due(request)
        return await self._answer(request, deadline, await self._reader.read(request.body), {})

    async def personal(self, request: Request, query: Query, about: Mapping[str, Any]) -> Response:
        """Answer a query that was made for a request; `about` is told beside the answer. Raises as `predict`."""
        return await self._answer(request, self._due(request), query, about)

    async def _answer(self, request: Request, deadline: float, query: Query, about: Mapping[str, Any]) -> Response:
        if self._cache is None:
            (outputs,) = await self.submit([Sample(query, self._endpoint.outputs)], deadline)
            return self._told(query, outputs, about)

        async def ask() -> Entry:
            (outputs,) = await self.submit([Sample(query, self._endpoint.outputs)], deadline)
            answer = self._endpoint.encode(query, outputs)
            return Entry(_encode(answer), self._endpoint.shown(answer), tenth=self._scores.tenth(outputs))

        fresh = b"no-cache" in (request.header(b"cache-control") or b"")
        entry, level = await self._cache.get(query, ask, deadline, fresh)
        if self._scores.due():
            self._scores.count(entry.tenth)
        told = _encode({"request_id": self._name(entry.shown), **self._who, **about})
        body = told[:-1] + b"," + entry.body[1:] if len(entry.body) > 2 else told  # two objects become one
        return Response(200, body, (*self._headers, (b"x-slipway-cache", level.encode())))

    def _told(self, query: Query, outputs: Tensors, about: Mapping[str, Any]) -> Response:
        """Tell what the model says."""
        answer = self._endpoint.encode(query, outputs)
        if self._scores.due():
            self._scores.count(self._scores.tenth(outputs))
        shown = self._endpoint.shown(answer) if self._memory is not None else ()
        body = _encode({"request_id": self._name(shown), **self._who, **about, **answer})
        return Response(200, body, self._headers)

    def _name(self, shown: Sequence[str]) -> str:
        """Name an answer; by its name feedback will know what it showed."""
        name = next(_NAMES)
        if self._memory is not None:
            self._memory.keep(name, Shown(self._version, shown))
        return name

    def _due(self, request: Request) -> float:
        """As `admitted`; but with a cache a full queue refuses only what the cache has not."""
        return self.admitted(request) if self._cache is None else time.monotonic() + self._patience_s(request)

    def admitted(self, request: Request) -> float:
        """Refuse a request before it is decoded, or give the moment by which it wants its answer."""
        deadline = time.monotonic() + self._patience_s(request)
        self._batcher.admit(1, deadline)
        return deadline

    def _patience_s(self, request: Request) -> float:
        """How long the client waits: as params say for a realtime request, or as it says itself, if that is less."""
        text, kind = request.header(b"x-deadline-ms"), request.header(b"x-request-class")
        usual_s = math.inf if kind == b"batch" else self._usual_s
        if text is None:
            return usual_s
        try:
            given_ms = float(text)
        except ValueError:
            given_ms = math.nan
        if not 0 < given_ms < math.inf:
            raise RequestError(
                f"header X-Deadline-Ms: expected milliseconds over 0, got {text[:20].decode('latin-1')!r}"
            )
        return min(usual_s, given_ms / 1e3)


def _names() -> Iterator[str]:
    """Names that nobody guesses; the kernel is asked for many at once, for each time it costs a switch of threads."""
    while True:
        text = os.urandom(12 * 256).hex()
        yield from (text[at : at + 24] for at in range(0, len(text), 24))


_NAMES = _names()
