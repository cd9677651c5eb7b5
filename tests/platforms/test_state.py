"""Users' events, personal answers and removal through the whole gateway, while a replica is killed."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import quote

from slipway.platforms.base import Fault, Routing
from slipway.platforms.local import stack
from tests.conftest import needs, until
from tests.platforms import stand
from tests.platforms.stand import Here
from tests.serving.packages import key

USER = "ann/é?"


def call(here: Here, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", here.params.stack.gateway_port, timeout=30)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def events_of(here: Here) -> Any:
    status, answer = call(here, "GET", f"/v1/recommend?user={quote(USER, safe='')}&k=5")
    assert status == 200, answer
    return answer["events"]


@needs("nginx", "redis-server", "prometheus")
def test_no_event_is_lost_at_the_gateway_when_a_replica_is_killed_and_a_removed_user_is_gone(here: Here) -> None:
    stack.up(here.params, ["state"], tell=lambda _: None)
    stand.publish("1")
    here.platform.deploy("ranker", "1", 2, timeout_s=60)
    here.platform.route(Routing("1"))
    for number in range(1, 41):
        if number == 10:
            here.platform.inject(here.platform.status().replicas["1"][0], Fault.KILL)
        event = {"user": USER, "item": key(number), "id": str(number)}
        assert call(here, "POST", "/v1/events", event) == (202, {"accepted": 1})
        events_of(here)
    until(lambda: events_of(here) == 40)
    path, told = f"/v1/users/{quote(USER, safe='')}", []

    def removed() -> bool:
        status, answer = call(here, "DELETE", path)
        told.append((status, answer))
        return status == 200

    until(removed, 60)
    assert told[-1] == (200, {"history": 40, "log": 40}), told
    assert events_of(here) == 0
    assert call(here, "DELETE", path) == (200, {"history": 0, "log": 0})
