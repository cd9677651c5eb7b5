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
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypedDict, cast, get_type_hints

import msgspec

from slipway.errors import DeadlineError, OverloadError, RequestError, TransientError
from slipway.params import ServeParams
from slipway.serving import openapi, protocol
from slipway.serving.batching import Batcher
from slipway.serving.cache import Cache
from slipway.serving.cache.cache import LEVELS, NONE, STALE
from slipway.serving.edge import Pending, Reply, Request, Response, in_tasks
from slipway.serving.feedback import Memory, Shown
from slipway.serving.metrics import CONTENT_TYPE, Metrics
from slipway.serving.model import Model, Sample
from slipway.serving.openapi import Route
from slipway.serving.predictor import JSON, Predictor
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
REQUEST_ID = b"x-request-id"
"""The gateway's name of a request, which its log bears, too."""
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
        self._model: Model | None = None
        self._predictor: Predictor | None = None
        self._batcher: Batcher[Sample, Tensors] | None = None
        self._waiting_for: str | None = "the model is being loaded and checked"
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
        self._in_task = in_tasks(self, self.refuse)

    def _name_version(self, version: str) -> None:
        self._headers = ((b"x-slipway-version", version.encode()),)

    def serve(self, model: Model) -> None:
        """Answer with `model` from now on; ready for traffic only with `welcome`."""
        self._name_version(model.version)
        self._model = model
        make = self._make_cache
        cache = make(f"{model.name}/{model.version}/{model.package.digest}") if make is not None else None
        params = self._params
        work = self._traces.work(model.predict) if self._traces else model.predict
        self._batcher = Batcher(work, params.max_batch, params.max_wait_ms / 1000, params.max_queue, self._metrics)
        self._predictor = Predictor(
            model, self._batcher, params, self._metrics, self._memory, cache, self._headers, self._failed
        )
        self._metrics.watch_queue(self._batcher.__len__)
        self._metrics.serves(model.package)
        self._routes |= self._routes_of(model, self._predictor)
        page = openapi.document(f"slipway: {model.name}", model.version, self._routes)
        self._document = _encode(page)
        self._busy = _with(self.error(429, BUSY), b"retry-after", b"1")
        self._waiting_for, self._metrics.warming_up = "the model is warming up", True

    def welcome(self) -> None:
        """Be ready for traffic; what was answered before was the warm-up, in no figure and no trace."""
        assert self._batcher is not None  # there is a model
        assert self._predictor is not None
        if self._traces:
            self._in_task = in_tasks(self._traces.answer(self), self.refuse)
            self._predictor.submit = self._traces.submit(self._batcher.submit)
        self._waiting_for, self._metrics.warming_up = None, False
        self._metrics.ready.set(1)

    async def died(self) -> None:
        """Wait until the engine's thread is dead, which nothing brings back."""
        assert self._batcher is not None  # there is a model
        while self._batcher.alive:
            await asyncio.sleep(DEAD_S)

    def _routes_of(self, model: Model, predictor: Predictor) -> dict[str, dict[str, Route]]:
        package, endpoint = model.package, model.endpoint
        self._metrics.name(predictor.label)
        about = model.name
        deadline = ({"name": "X-Deadline-Ms", "in": "header", "description": DEADLINE, "schema": POSITIVE},)
        fresh = {"name": "Cache-Control", "in": "header", "description": FRESH, "schema": {"type": "string"}}
        infer, inferred = protocol.schemas(package.inputs, package.outputs, self._params.max_batch)
        html = {"type": "string"}
        routes = {
            endpoint.path: {
                "POST": Route(
                    predictor.label,
                    predictor.predict,
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
            more = personal.routes(self._state, endpoint, answer, predictor.personal, self._json)
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
        if self._predictor is not None:
            self._predictor.close()

    def begin(self, request: Request, reply: Reply) -> Response | Pending:
        """Answer one request, whatever happens; what would come too late before anything else is done for it."""
        predictor = self._predictor
        if predictor is not None and request.path == predictor.path and request.method == "POST":
            if predictor.should_shed(request):
                self._metrics.answered(predictor.label, 429, 0.0)
                return self._busy
            if self._traces is None and predictor.at_once(request):
                return predictor.begin(request, reply)
        return self._in_task(request, reply)

    async def __call__(self, request: Request) -> Response:
        """Answer one request in a task, whatever happens."""
        began = time.monotonic()
        path = request.path if request.path in self._routes else personal.template(request.path)
        methods = self._routes.get(path, NOWHERE)
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        label = "other" if route is None else route.label
        try:
            response = await route.handler(request) if route is not None else self._unknown(request, methods)
        except Exception as error:  # noqa: BLE001  # the client is told
            response = self._failed(error, request, label)
        self._metrics.answered(label, response.status, time.monotonic() - began)
        return response

    def _failed(self, error: Exception, request: Request, label: str) -> Response:
        """Make the response of an error; of our own mistakes the client gets a 500, and the log the place."""
        if isinstance(error, RequestError):
            return self.error(400, str(error))
        if isinstance(error, OverloadError):
            return _with(self.error(429, str(error)), b"retry-after", b"1")
        if isinstance(error, DeadlineError):
            return self.error(504, str(error))
        if isinstance(error, TransientError):
            return self.error(503, str(error))
        where = "".join(traceback.format_tb(error.__traceback__))  # without the message: it may quote the request
        about = {"request_id": _text(request.header(REQUEST_ID)), "endpoint": label}
        logger.error(
            "a request failed: error=%s request_id=%s\n%s",
            type(error).__name__,
            about["request_id"],
            where,
            extra={"about": about},
        )
        return self.error(500, "an error inside the model server; its log says where")

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
        assert self._predictor is not None  # routed to only once a model is there
        deadline = self._predictor.admitted(request)
        message = protocol.parted(request.body, request.header(protocol.JSON_LENGTH))
        inference = protocol.read_infer(
            message, package.inputs, package.outputs, endpoint.outputs, self._params.max_batch
        )
        for inputs in inference.samples:
            endpoint.check(inputs)
        samples = [Sample(Query(inputs, {}), inference.outputs) for inputs in inference.samples]
        results = await self._predictor.submit(samples, deadline)
        answer, raw = protocol.write_infer(model.name, model.version, inference, results, package.outputs)
        if not inference.binary:
            return self._json(answer)
        head = _encode(answer)
        length = (protocol.JSON_LENGTH, str(len(head)).encode())
        headers = (*self._headers, (b"content-type", b"application/octet-stream"), length)
        return Response(200, b"".join([head, *raw]), headers)

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

    def _served(self) -> Model:
        assert self._model is not None  # routed to only once a model is there
        return self._model


def _text(header: bytes | None) -> str:
    """Give an id that came from outside: letters, digits and dashes, so that it cannot forge a line of the log."""
    return "".join(c for c in (header or b"")[:64].decode("ascii", "replace") if c.isalnum() or c == "-")


def _with(response: Response, name: bytes, value: bytes) -> Response:
    return msgspec.structs.replace(response, headers=(*response.headers, (name, value)))
