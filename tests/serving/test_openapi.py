"""The page that describes a replica, held against what the replica does."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from tests.serving.conftest import Replica
from tests.serving.packages import key

ASKED = {
    "/v1/recommend": {"history": [key(3), "unknown"], "k": 2},
    "/v2/models/ranker/infer": {
        "inputs": [{"name": "history", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}],
        "outputs": [{"name": "items"}],
    },
}


@pytest.fixture(scope="module")
def page(replica: Replica) -> Any:
    return replica.get("/openapi.json").json


def fits(page: Any, schema: Any, value: Any) -> None:
    """Raise unless a value fits a schema of the page."""
    jsonschema.Draft202012Validator({**page, **schema}).validate(value)


def test_every_answer_fits_what_the_page_says_of_it(replica: Replica, page: Any) -> None:
    assert page["openapi"].startswith("3.1")
    for path, methods in page["paths"].items():
        for method, told in methods.items():
            if path == "/v1/feedback":
                continue  # has no Redis here
            (content,) = told["responses"]["200"]["content"].items()
            body = ASKED.get(path.replace("/versions/7", ""))
            reply = replica.call(method.upper(), path, body)
            assert reply.status == 200, path
            assert reply.headers["content-type"].startswith(content[0])
            if content[0] == "application/json":
                fits(page, content[1]["schema"], reply.json)
            if body is not None:
                fits(page, told["requestBody"]["content"]["application/json"]["schema"], body)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("POST", "/v1/recommend", {"history": 1}), ("PUT", "/v1/recommend", {}), ("GET", "/v3", None)],
)
def test_every_refusal_fits_what_the_page_says_of_errors(
    replica: Replica, page: Any, method: str, path: str, body: Any
) -> None:
    reply = replica.call(method, path, body)
    assert reply.status in (400, 404, 405)
    refused = page["components"]["responses"]["Refused"]
    fits(page, refused["content"]["application/json"]["schema"], reply.json)


def test_the_page_bounds_what_the_decoder_bounds(page: Any) -> None:
    schema = page["paths"]["/v1/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fits(page, schema, {"history": [key(1)], "k": 100})
    for wrong in ({"history": [key(1)], "k": 101}, {"k": 1}, {"history": [], "extra": 1}):
        with pytest.raises(jsonschema.ValidationError):
            fits(page, schema, wrong)


def test_the_page_for_people_needs_nothing_from_elsewhere(replica: Replica) -> None:
    reply = replica.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(rb"https?:|//[a-z]+\.|src=|@import|url\(", reply.body) == []
