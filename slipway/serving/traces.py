"""Traces of requests, sent to an OpenTelemetry collector where `OTEL_EXPORTER_OTLP_ENDPOINT` names one.

A request is a span under the one that its client names in `traceparent`, which the gateway passes on; below it lie its
wait in the queue and the run of the engine that it shared. They are sent in batches by a thread of the SDK's own, which
also heeds OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME and its other variables. Where no endpoint is named nothing is wrapped
and nothing imported, so it costs nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

from slipway.serving.edge import Request, Response

R = TypeVar("R")
P = ParamSpec("P")
Answer = Callable[[Request], Awaitable[Response]]

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
LEFT_OUT = ("/metrics", "/v2/health/")
FLUSH_S = 3.0


def wanted() -> bool:
    """Whether the environment names a collector."""
    return any(os.environ.get(name) for name in VARIABLES)


class _Run:
    """When the engine ran some samples (ns of the clock on the wall)."""

    __slots__ = ("began", "ended", "size")

    def __init__(self) -> None:
        self.began = self.ended = self.size = 0


class Traces:
    """Wraps what a request goes through; made only where traces are `wanted`."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.propagate import extract
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode

        named = "OTEL_SERVICE_NAME" in os.environ
        self._provider = TracerProvider(
            resource=Resource.create({} if named else {"service.name": "slipway"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("slipway")
        self._extract, self._server, self._failed = extract, SpanKind.SERVER, Status(StatusCode.ERROR)
        self._runs: dict[int, _Run] = {}

    def answer(self, app: Answer) -> Answer:
        """Give each request its span."""

        async def traced(request: Request) -> Response:
            if request.path.startswith(LEFT_OUT):
                return await app(request)
            given = ((name, request.header(name.encode())) for name in ("traceparent", "tracestate"))
            carrier = {name: value.decode("latin-1") for name, value in given if value is not None}
            # Names of paths are few, but for those that name a user, whose first words are enough.
            name = f"{request.method} {'/'.join(request.path.split('/')[:3])}"
            with self._tracer.start_as_current_span(name, self._extract(carrier), self._server) as span:
                response = await app(request)
                span.set_attribute("http.request.method", request.method)
                span.set_attribute("http.response.status_code", response.status)
                if (request_id := request.header(b"x-request-id")) is not None:
                    span.set_attribute("slipway.request_id", request_id.decode("latin-1"))
                if (version := dict(response.headers).get(b"x-slipway-version")) is not None:
                    span.set_attribute("slipway.version", version.decode())
                if response.status >= 500:
                    span.set_status(self._failed)
            return response

        return traced

    def submit(self, submit: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        """Tell how long a group of samples, the first argument, waits, and how long it runs."""

        async def traced(*args: P.args, **kwargs: P.kwargs) -> R:
            key, run, queued = id(cast("Sequence[Any]", args[0])[0]), _Run(), time.time_ns()
            self._runs[key] = run
            try:
                return await submit(*args, **kwargs)
            finally:
                del self._runs[key]
                now = time.time_ns()
                self._tell("queue", queued, run.began or now)
                if run.began:
                    self._tell("engine", run.began, run.ended or now, {"slipway.batch_size": run.size})

        return traced

    def work(self, work: Callable[[Sequence[Any]], R]) -> Callable[[Sequence[Any]], R]:
        """Note when a batch runs; called in the engine's thread."""

        def traced(samples: Sequence[Any]) -> R:
            mine = [run for sample in samples if (run := self._runs.get(id(sample))) is not None]
            began = time.time_ns()
            for run in mine:
                run.began, run.size = run.began or began, len(samples)
            try:
                return work(samples)
            finally:
                ended = time.time_ns()
                for run in mine:
                    run.ended = ended

        return traced

    def close(self) -> None:
        """Send what is left, for a moment: a collector that is away must not keep a replica from its end."""
        sender = threading.Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
        sender.start()
        sender.join(FLUSH_S)

    def _tell(self, name: str, began: int, ended: int, about: dict[str, int] | None = None) -> None:
        self._tracer.start_span(name, attributes=about, start_time=began).end(ended)
