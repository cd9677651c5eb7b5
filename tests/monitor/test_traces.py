"""Traces, as a collector gets them: OTLP over HTTP, decoded."""

from __future__ import annotations

import gzip
import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.conftest import until
from tests.serving.conftest import Start
from tests.serving.packages import key

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps every span that it is sent, with the name of the service that sent it."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                packed = self.headers.get("Content-Encoding") == "gzip"
                asked = ExportTraceServiceRequest.FromString(gzip.decompress(body) if packed else body)
                for part in asked.resource_spans:
                    about = {a.key: a.value.string_value for a in part.resource.attributes}
                    spans = [span for scope in part.scope_spans for span in scope.spans]
                    collector.spans += [(about["service.name"], span) for span in spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def trace(self, name: str) -> list[Any]:
        return [span for _, span in self.spans if span.trace_id.hex() == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.server.shutdown()
    running.server.server_close()


def about(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_a_trace_under_its_clients(start: Start, collector: Collector) -> None:
    replica = start(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="100", NO_PROXY="127.0.0.1")
    replica.wait_until_ready()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "abc"}
    url = f"http://127.0.0.1:{replica.port}"
    body = json.dumps({"history": [key(3)], "user": "secret"}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/v1/recommend", body, headers)).close()
    until(lambda: len(collector.trace(TRACE)) >= 3, 30)
    assert {service for service, _ in collector.spans} == {"slipway"}
    assert not [span.name for _, span in collector.spans if "GET" in span.name], "health and numbers leave no trace"
    spans = {span.name: span for span in collector.trace(TRACE)}
    assert set(spans) == {"POST /v1/recommend", "queue", "engine"}
    server, queue, engine = spans["POST /v1/recommend"], spans["queue"], spans["engine"]
    assert (server.trace_id.hex(), server.parent_span_id.hex(), server.kind) == (TRACE, PARENT, 2)
    assert about(server) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "slipway.request_id": "abc",
        "slipway.version": "7",
    }
    assert {queue.parent_span_id, engine.parent_span_id} == {server.span_id}
    assert server.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano == engine.start_time_unix_nano < engine.end_time_unix_nano
    assert engine.end_time_unix_nano <= server.end_time_unix_nano
    assert about(engine) == {"slipway.batch_size": 1}
    assert "secret" not in str(collector.spans)


def test_what_was_not_sent_yet_is_sent_at_the_end(start: Start, collector: Collector) -> None:
    replica = start(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="60000", NO_PROXY="127.0.0.1")
    replica.wait_until_ready()
    for _ in range(5):
        assert replica.post("/v1/recommend", {"history": [key(3)]}).status == 200
    assert collector.spans == []
    assert replica.stop() == 0
    names = Counter(span.name for _, span in collector.spans)
    assert names == {"POST /v1/recommend": 5, "queue": 5, "engine": 5}, "nothing of the warm-up"


def test_a_collector_that_is_away_costs_no_answer_and_no_end(start: Start) -> None:
    replica = start(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", NO_PROXY="127.0.0.1")
    replica.wait_until_ready()
    assert replica.post("/v1/recommend", {"history": [key(3)]}).status == 200
    assert replica.stop() == 0


def test_without_an_endpoint_nothing_of_it_is_loaded(start: Start) -> None:
    replica = start()
    replica.wait_until_ready()
    maps = Path(f"/proc/{replica.process.pid}/maps").read_text()
    assert "google/_upb" not in maps, "protobuf, which the exporter needs, is loaded"
