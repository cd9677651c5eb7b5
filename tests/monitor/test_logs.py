"""The logs: a JSON object a line, the same request id at the gateway and in the replica, nothing of what was asked."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from slipway.params import ServeParams
from slipway.platforms.base import Routing
from slipway.platforms.local.layout import Layout
from slipway.serving import logs
from slipway.serving import model as models
from slipway.serving.edge import Request
from slipway.serving.metrics import Metrics
from slipway.serving.server import App
from tests.conftest import needs, until
from tests.platforms import stand
from tests.platforms.stand import Here


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


@needs("nginx", "redis-server", "prometheus")
def test_the_gateway_logs_what_failed_and_nothing_of_its_content(here: Here) -> None:
    stand.publish("1")
    here.platform.deploy("ranker", "1", 1, timeout_s=60)
    here.platform.route(Routing("1"))
    log, url = Layout(here.home).log("gateway"), here.platform.gateway_url
    for path in ("/v1/recommend?user=secret", "/v1/users/secret", "/secret"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(url + path, b'{"history": 7, "user": "secret"}'))
    with urllib.request.urlopen(f"{url}/v1/recommend", b'{"history": ["item1"]}') as answer:
        assert answer.status == 200
    until(lambda: len([line for line in lines(log) if line["why"] == "error"]) == 3)
    failed = sorted((line for line in lines(log) if line["why"] == "error"), key=lambda line: line["endpoint"])
    assert [line["status"] for line in failed] == [400, 405, 404]
    assert [line["endpoint"] for line in failed] == ["/v1/recommend", "/v1/users", "other"]
    assert (failed[0]["track"], failed[0]["version"], failed[0]["class"]) == ("champion", "1", "realtime")
    assert failed[0]["replica"].startswith("127.0.0.1:")
    assert all(len(line["request_id"]) == 32 and line["seconds"] >= 0 for line in failed)
    assert "secret" not in log.read_text()
    (replica,) = here.platform.status().replicas["1"]
    assert [line["level"] for line in lines(Layout(here.home).log(replica.name))] == ["INFO"]


def test_a_replica_logs_a_failure_with_the_gateways_id_and_nothing_of_its_content(package: Path) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonFormatter({"replica": "127.0.0.1:1"}))
    logger = logging.getLogger("slipway.serving.server")
    logger.addHandler(handler)
    try:
        asyncio.run(fail(package))
    finally:
        logger.removeHandler(handler)
    (line,) = (json.loads(line) for line in written.getvalue().splitlines())
    assert (line["level"], line["replica"], line["endpoint"]) == ("ERROR", "127.0.0.1:1", "recommend")
    assert line["request_id"] == "0123abcdforged"
    assert "KeyError" in line["message"]
    assert "secret" not in written.getvalue()


async def fail(package: Path) -> None:
    """Ask an app whose batcher breaks."""
    app = App("1", ServeParams(), Metrics(), None)
    app.serve(models.load(package, "1", 1))
    assert app._predictor is not None
    app._predictor.submit = broken  # type: ignore[assignment]  # no request can do this
    headers = {b"x-request-id": b"0123abcd\nforged"}
    answer = await app(Request("POST", "/v1/recommend", b'{"history": ["item1"], "user": "secret"}', b"", headers))
    app.close()
    assert answer.status == 500
    assert b"secret" not in answer.body


async def broken(*_: object) -> None:
    raise KeyError("".join(["sec", "ret"]))  # a trace quotes its source


def test_a_format_that_there_is_not_is_refused(package: Path, start: Any) -> None:
    replica = start(SLIPWAY_LOG_FORMAT="xml")
    assert replica.process.wait(60) == 2
    assert "SLIPWAY_LOG_FORMAT: expected text or json, got 'xml'" in replica.log
