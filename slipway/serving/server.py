"""What a replica answers: health, metrics, the Open Inference Protocol, the workload's endpoint, and feedback.

    GET  /v2/health/live                        as soon as the loop runs
    GET  /v2/health/ready                       after the golden check, until the drain
    GET  /v2, /v2/models/NAME[/versions/V]      metadata; .../ready
    POST /v2/models/NAME[/versions/V]/infer     raw tensors
    POST /v1/...                                the workload's own endpoint
    POST /v1/feedback                           what became of an answer
    POST /v1/events, DELETE /v1/users/...       users' events, and the endpoint's GET from them: see state/personal.py
    GET  /metrics
    GET  /openapi.json, /docs                   all of this, for programs and for people

Errors are {"error": "..."}; nothing of a request is ever logged.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypedDict, cast, get_type_hints

import msgspec

from slipway.config import ServeParams
from slipway.errors import DeadlineError, OverloadError, RequestError, TransientError
from slipway.serving import openapi, protocol
from slipway.serving.batching import Batcher
from slipway.serving.cache import Cache
from slipway.serving.cache.cache import LEVELS, NONE, STALE
from slipway.serving.cache.entry import Entry
from slipway.serving.edge import Request, Response
from slipway.serving.feedback import Memory, Shown
from slipway.serving.metrics import CONTENT_TYPE, Metrics
from slipway.serving.model import Model, Sample
from slipway.serving.openapi import Route
from slipway.serving.reading import Reader
from slipway.serving.scores import Watch
from slipway.serving.state import personal
from slipway.serving.state.personal import State
from slipway.serving.traces import Traces
from slipway.workloads.base import Personal, Query, Tensors, parse

logger = logging.getLogger(__name__)


class Live(msgspec.Struct):
    """The event loop runs."""

    live: bool


class Ready(msgspec.Struct):
    """Requests are welcome."""

    ready: bool


class Server(msgspec.Struct):
    """What the protocol tells of the server."""

    name: str
    version: str
    extensions: Sequence[str]


class Accepted(msgspec.Struct):
    """It was taken."""

    accepted: bool


class Feedback(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a feedback."""

    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    """The answer that it is about."""
    item: Annotated[str, msgspec.Meta(max_length=512)] | int
    """What the user took."""


_FEEDBACK = msgspec.json.Decoder(Feedback)
_encode = msgspec.json.Encoder().encode
NOWHERE: Mapping[str, Route] = {}
TEXT = "text/plain"
JSON = ((b"content-type", b"application/json"),)
REQUEST_ID = b"x-request-id"
"""The gateway's name of a request, which its log bears, too."""
OWN_PATIENCE = frozenset((b"x-deadline-ms", b"x-request-class"))
"""Headers of requests that do not wait as long as usual."""
BUSY = "more requests wait than can be answered in time; try again later"
DEAD_S = 0.2
"""A dead engine is looked for this often."""
DEADLINE = "Milliseconds that the client waits, if fewer than usual; what cannot be answered in them gets 429 at once."
POSITIVE = {"type": "number", "exclusiveMinimum": 0}
FRESH = "`no-cache`: the model is asked, whatever is kept."
LEVEL = (
    "Where the answer came from; none: the model, stale: an old answer, for the model has none. Absent without a cache."
)
CACHED = {"X-Slipway-Cache": {"description": LEVEL, "schema": {"enum": [*LEVELS, NONE, STALE]}}}
"""What is told of the cache, by the header of the answer."""


def answered(answer: type, name: str = "Answer", **more: Any) -> type:
    """Give the type of a whole answer of the workload's endpoint: who answered what, and the workload's own part."""
    about: dict[str, Any] = {"request_id": str, "model": str, "version": str, **more}
    return cast("type", TypedDict(name, {**about, **get_type_hints(answer, include_extras=True)}))  # type: ignore[operator]


class App:
    """Routes requests to handlers; without a model, which `serve` brings, it is live and not ready."""

    def __init__(
        self,
        version: str,
        params: ServeParams,
        metrics: Metrics,
        memory: Memory | None,
        traces: Traces | None = None,
        state: State | None = None,
        cache: Callable[[str], Cache] | None = None,
    ) -> None:
        self._params, self._metrics, self._memory, self._traces = params, metrics, memory, traces
        self._state = state
        self._make_cache = cache
        self._cache: Cache | None = None
        self._model: Model | None = None
        self._reader: Reader | None = None
        self._batcher: Batcher[Sample, Tensors] | None = None
        self._waiting_for: str | None = "the model is being loaded and checked"
        self._scores = Watch((), "", ())
        self._headers: tuple[tuple[bytes, bytes], ...] = ()
        self._name_version(version)
        self._routes: dict[str, dict[str, Route]] = {
            "/v2/health/live": {"GET": Route("health", self._live, "Does the server run?", Live)},
            "/v2/health/ready": {"GET": Route("health", self._ready, "Are requests welcome?", Ready)},
            "/metrics": {
                "GET": Route("metrics", self._exposition, "Numbers, for Prometheus", {"type": "string"}, content=TEXT)
            },
        }
        self._document = b""
        self._sheds = self._shed_label = ""
        self._usual_s = params.deadline_ms / 1e3 or math.inf
        self._passed = 0  # requests of the loop's present turn that are not in the queue yet

    def _name_version(self, version: str) -> None:
        self._headers = ((b"x-slipway-version", version.encode()),)

    def serve(self, model: Model) -> None:
        """Answer with `model` from now on; ready for traffic only with `welcome`."""
        self._name_version(model.version)
        self._model = model
        if self._make_cache is not None:
            self._cache = self._make_cache(f"{model.name}/{model.version}/{model.package.digest}")
        self._reader = Reader(model.endpoint, self._params.max_queue)
        params = self._params
        work = self._traces.work(model.predict) if self._traces else model.predict
        self._batcher = Batcher(work, params.max_batch, params.max_wait_ms / 1000, params.max_queue, self._metrics)
        self._submit: Callable[[Sequence[Sample], float], Awaitable[Sequence[Tensors]]] = self._batcher.submit
        self._metrics.watch_queue(self._batcher.__len__)
        self._metrics.serves(model.package)
        self._scores = Watch(model.package.score_deciles, model.endpoint.outputs[-1], self._metrics.tenths)
        self._routes |= self._routes_of(model)
        page = openapi.document(f"slipway: {model.name}", model.version, self._routes)
        self._document = _encode(page)
        self._sheds = model.endpoint.path
        self._shed_label = self._sheds.rpartition("/")[2]
        self._busy = _with(self.error(429, BUSY), b"retry-after", b"1")
        self._waiting_for, self._metrics.warming_up = "the model is warming up", True

    def welcome(self) -> None:
        """Be ready for traffic; what was answered before was the warm-up, in no figure and no trace."""
        assert self._batcher is not None  # there is a model
        if self._traces:
            self._submit = self._traces.submit(self._batcher.submit)
        self._waiting_for, self._metrics.warming_up = None, False
        self._metrics.ready.set(1)

    async def died(self) -> None:
        """Wait until the engine's thread is dead, which nothing brings back."""
        assert self._batcher is not None  # there is a model
        while self._batcher.alive:
            await asyncio.sleep(DEAD_S)

    def _routes_of(self, model: Model) -> dict[str, dict[str, Route]]:
        package, endpoint = model.package, model.endpoint
        own = endpoint.path.rpartition("/")[2]  # such as recommend
        self._metrics.name(own)
        about = model.name
        deadline = ({"name": "X-Deadline-Ms", "in": "header", "description": DEADLINE, "schema": POSITIVE},)
        fresh = {"name": "Cache-Control", "in": "header", "description": FRESH, "schema": {"type": "string"}}
        infer, inferred = protocol.schemas(package.inputs, package.outputs, self._params.max_batch)
        html = {"type": "string"}
        routes = {
            endpoint.path: {
                "POST": Route(
                    own,
                    self._friendly,
                    f"Ask the {about}",
                    answered(endpoint.answer),
                    endpoint.request,
                    parameters=(*deadline, fresh),
                    headers=CACHED,
                )
            },
            "/v1/feedback": {
                "POST": Route("feedback", self._feedback, "Say what became of an answer", Accepted, Feedback, 202)
            },
            "/v2": {"GET": Route("model", self._server_metadata, "What the server is", Server)},
            "/openapi.json": {"GET": Route("model", self._openapi, "This page, for programs", {"type": "object"})},
            "/docs": {"GET": Route("model", self._docs, "This page, for people", html, content="text/html")},
        }
        for path in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
            told, asked = "Inputs and outputs", "Run the model on raw tensors (Open Inference Protocol)"
            routes[path] = {"GET": Route("model", self._model_metadata, told, protocol.Metadata)}
            routes[f"{path}/ready"] = {"GET": Route("health", self._ready, "Are requests welcome?", Ready)}
            routes[f"{path}/infer"] = {"POST": Route("infer", self._infer, asked, inferred, infer, parameters=deadline)}
        if self._state is not None and isinstance(endpoint, Personal):
            answer = answered(endpoint.answer, "PersonalAnswer", events=int | None)
            more = personal.routes(self._state, endpoint, answer, self._personal, self._json)
            for name in personal.LABELS:
                self._metrics.name(name)
            ask = more[endpoint.path]["GET"]
            more[endpoint.path]["GET"] = ask._replace(parameters=(*ask.parameters, *deadline, fresh), headers=CACHED)
            routes |= {path: {**routes.get(path, {}), **methods} for path, methods in more.items()}
        return routes

    def drain(self) -> None:
        """Be ready no more; requests are still answered."""
        self._waiting_for = "this replica is draining"
        self._metrics.ready.set(0)

    def close(self) -> None:
        """End the threads of engine and reader."""
        if self._batcher is not None:
            self._batcher.close()
        if self._reader is not None:
            self._reader.close()

    def shed(self, request: Request) -> Response | None:
        """Refuse a request that would come too late in any case; not where a cache may have its answer."""
        if self._batcher is None or self._cache is not None or request.method != "POST":
            return None
        if request.path != self._sheds or any(name in OWN_PATIENCE for name, _ in request.headers):
            return None
        if not self._batcher.late(1, self._usual_s, self._passed):
            if not self._passed:
                asyncio.get_running_loop().call_soon(self._queued)
            self._passed += 1
            return None
        self._metrics.answered(self._shed_label, 429, 0.0)
        return self._busy

    def _queued(self) -> None:
        """Those that came in the loop's last turn are about to be in the queue."""
        self._passed = 0

    async def __call__(self, request: Request) -> Response:
        """Answer one request, whatever happens."""
        began = time.monotonic()
        path = request.path if request.path in self._routes else personal.template(request.path)
        methods = self._routes.get(path, NOWHERE)
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        label = "other" if route is None else route.label
        try:
            response = await route.handler(request) if route is not None else self._unknown(request, methods)
        except RequestError as error:
            response = self.error(400, str(error))
        except OverloadError as error:
            response = _with(self.error(429, str(error)), b"retry-after", b"1")
        except DeadlineError as error:
            response = self.error(504, str(error))
        except TransientError as error:
            response = self.error(503, str(error))
        except Exception as error:  # noqa: BLE001  # the client gets a 500, the log gets the place
            where = "".join(traceback.format_tb(error.__traceback__))  # without the message: it may quote the request
            about = {"request_id": _text(request.header(REQUEST_ID)), "endpoint": label}
            logger.error(
                "a request failed: error=%s request_id=%s\n%s",
                type(error).__name__,
                about["request_id"],
                where,
                extra={"about": about},
            )
            response = self.error(500, "an error inside the model server; its log says where")
        self._metrics.answered(label, response.status, time.monotonic() - began)
        return response

    def refuse(self, status: int, message: str) -> Response:
        """Answer what never became a request."""
        self._metrics.answered("other", status, 0.0)
        return self.error(status, message)

    def error(self, status: int, message: str) -> Response:
        """Make an error's response."""
        return self._json({"error": message}, status)

    def _json(self, value: object, status: int = 200) -> Response:
        return Response(status, _encode(value), (*self._headers, *JSON))

    def _unknown(self, request: Request, methods: Mapping[str, Route]) -> Response:
        if methods:
            allowed = ", ".join(methods)
            return _with(self.error(405, f"{request.path} takes {allowed} only"), b"allow", allowed.encode())
        if self._model is None:
            return self.error(503, f"not ready: {self._waiting_for}")
        model = self._model
        return self.error(
            404,
            f"no such path; this is version {model.version} of {model.name}: POST {model.endpoint.path}, /v1/feedback "
            f"or /v2/models/{model.name}/infer",
        )

    async def _live(self, _: Request) -> Response:
        return self._json(Live(True))

    async def _ready(self, _: Request) -> Response:
        ails = self._waiting_for or (self._batcher.ails if self._batcher is not None else "")
        return self.error(503, f"not ready: {ails}") if ails else self._json(Ready(True))

    async def _exposition(self, _: Request) -> Response:
        headers = (*self._headers, (b"content-type", CONTENT_TYPE.encode()))
        return Response(200, self._metrics.exposition(), headers)

    async def _openapi(self, _: Request) -> Response:
        return Response(200, self._document, (*self._headers, *JSON))

    async def _docs(self, _: Request) -> Response:
        headers = (*self._headers, (b"content-type", b"text/html; charset=utf-8"))
        return Response(200, openapi.DOCS.read_bytes(), headers)

    async def _server_metadata(self, _: Request) -> Response:
        model = self._served()
        return self._json(Server("slipway", model.version, protocol.EXTENSIONS))

    async def _model_metadata(self, _: Request) -> Response:
        model = self._served()
        package = model.package
        return self._json(protocol.metadata(model.name, model.version, package.inputs, package.outputs))

    async def _infer(self, request: Request) -> Response:
        model = self._served()
        package, endpoint = model.package, model.endpoint
        deadline = self._admitted(request)
        message = protocol.parted(request.body, request.header(protocol.JSON_LENGTH))
        inference = protocol.read_infer(
            message, package.inputs, package.outputs, endpoint.outputs, self._params.max_batch
        )
        for inputs in inference.samples:
            endpoint.check(inputs)
        samples = [Sample(Query(inputs, {}), inference.outputs) for inputs in inference.samples]
        results = await self._submit(samples, deadline)
        answer, raw = protocol.write_infer(model.name, model.version, inference, results, package.outputs)
        if not inference.binary:
            return self._json(answer)
        head = _encode(answer)
        length = (protocol.JSON_LENGTH, str(len(head)).encode())
        headers = (*self._headers, (b"content-type", b"application/octet-stream"), length)
        return Response(200, b"".join([head, *raw]), headers)

    async def _friendly(self, request: Request) -> Response:
        assert self._reader is not None  # routed to only once a model is there
        deadline = self._due(request)
        return await self._answer(request, deadline, await self._reader.read(request.body), {})

    async def _personal(self, request: Request, query: Query, about: Mapping[str, Any]) -> Response:
        return await self._answer(request, self._due(request), query, about)

    async def _answer(self, request: Request, deadline: float, query: Query, about: Mapping[str, Any]) -> Response:
        """Answer one request of the workload's endpoint; `about` is told beside the answer."""
        model = self._served()
        endpoint = model.endpoint

        counts = self._scores.due()
        wanted = counts or self._cache is not None

        async def ask() -> Entry:
            (outputs,) = await self._submit([Sample(query, endpoint.outputs)], deadline)
            answer = endpoint.encode(query, outputs)
            tenth = self._scores.tenth(outputs) if wanted else -1
            return Entry(_encode(answer), endpoint.shown(answer), tenth=tenth)

        headers: tuple[tuple[bytes, bytes], ...] = JSON
        if self._cache is None:
            entry = await ask()
        else:
            fresh = b"no-cache" in (request.header(b"cache-control") or b"")
            entry, level = await self._cache.get(query, ask, deadline, fresh)
            headers = (*JSON, (b"x-slipway-cache", level.encode()))
        if counts:
            self._scores.count(entry.tenth)
        request_id = next(_NAMES)
        if self._memory is not None:
            self._memory.keep(request_id, Shown(model.version, entry.shown))
        told = _encode({"request_id": request_id, "model": model.name, "version": model.version, **about})
        body = told[:-1] + b"," + entry.body[1:] if len(entry.body) > 2 else told  # two objects become one
        return Response(200, body, (*self._headers, *headers))

    async def _feedback(self, request: Request) -> Response:
        feedback = parse(_FEEDBACK, request.body)
        if self._memory is None:
            raise TransientError("feedback is not taken here: this replica was started without Redis")
        shown = await self._memory.use(feedback.request_id)
        if shown is False:
            return self.error(404, "request_id: no such answer, or it is older than an hour")
        if isinstance(shown, Shown):
            outcome = "hit" if str(feedback.item) in shown.items else "miss"
            self._metrics.feedback.labels(shown.version, outcome).inc()
        return self._json(Accepted(True), 202)

    def _due(self, request: Request) -> float:
        """As `_admitted`; but with a cache a full queue refuses only what the cache has not."""
        return self._admitted(request) if self._cache is None else time.monotonic() + self._patience_s(request)

    def _admitted(self, request: Request) -> float:
        """Refuse a request before it is decoded, or give the moment by which it wants its answer."""
        assert self._batcher is not None  # routed to only once a model is there
        deadline = time.monotonic() + self._patience_s(request)
        self._batcher.admit(1, deadline)
        return deadline

    def _patience_s(self, request: Request) -> float:
        """How long the client waits: as params say for a realtime request, or as it says itself, if that is less."""
        text, kind = request.header(b"x-deadline-ms"), request.header(b"x-request-class")
        usual_s = math.inf if kind == b"batch" or not self._params.deadline_ms else self._params.deadline_ms / 1e3
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

    def _served(self) -> Model:
        assert self._model is not None  # routed to only once a model is there
        return self._model


def _text(header: bytes | None) -> str:
    """Give an id that came from outside: letters, digits and dashes, so that it cannot forge a line of the log."""
    return "".join(c for c in (header or b"")[:64].decode("ascii", "replace") if c.isalnum() or c == "-")


def _names() -> Iterator[str]:
    """Names that nobody guesses; the kernel is asked for many at once, for each time it costs a switch of threads."""
    while True:
        text = os.urandom(12 * 256).hex()
        yield from (text[at : at + 24] for at in range(0, len(text), 24))


_NAMES = _names()


def _with(response: Response, name: bytes, value: bytes) -> Response:
    return response._replace(headers=(*response.headers, (name, value)))
