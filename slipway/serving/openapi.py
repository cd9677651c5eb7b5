"""The page that says what a replica takes and gives: OpenAPI 3.1, made from its routes and the types behind them.

    GET /openapi.json    for programs
    GET /docs            for people: docs.html, which draws the former and needs nothing from elsewhere

What is decoded is what is described: bodies and answers are the msgspec types of the handlers, raw tensors the
signature of the package.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from slipway.serving.edge import Request, Response

DOCS = Path(__file__).with_name("docs.html")

Handler = Callable[[Request], Awaitable[Response]]
Schema = Mapping[str, Any]


class Route(NamedTuple):
    """What answers one method of one path, and what is told of it."""

    label: str
    """Its name in the metrics."""
    handler: Handler
    summary: str
    answer: type | Schema
    """Type of the answer, or its JSON Schema."""
    body: type | Schema | None = None
    """Type of the request's body, or its JSON Schema."""
    status: int = 200
    content: str = "application/json"
    """Type of the answer's content."""
    parameters: tuple[Schema, ...] = ()
    """Headers and query, each an OpenAPI parameter."""
    headers: Schema = MappingProxyType({})
    """Of the answer, by name, each an OpenAPI header."""


class Error(msgspec.Struct):
    """What is wrong, and what is allowed."""

    error: str


def document(title: str, version: str, routes: Mapping[str, Mapping[str, Route]]) -> Schema:
    """Describe routes by path and method."""
    types = {Error} | {
        kind
        for methods in routes.values()
        for route in methods.values()
        for kind in (route.answer, route.body)
        if kind is not None and not isinstance(kind, Mapping)
    }
    ordered = sorted(types, key=lambda kind: kind.__name__)
    made, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(ordered, made, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": {
            path: {method.lower(): _operation(route, schemas) for method, route in methods.items()}
            for path, methods in routes.items()
        },
        "components": {
            "schemas": components,
            "responses": {
                "Refused": {"description": "Refused: says what is wrong.", **_content(schemas[Error])},
                "Failed": {"description": "Not now, or not at all: says why.", **_content(schemas[Error])},
            },
        },
    }


def _operation(route: Route, schemas: Mapping[type, Schema]) -> Schema:
    def schema(kind: type | Schema) -> Schema:
        return kind if isinstance(kind, Mapping) else schemas[kind]

    operation: dict[str, Any] = {
        "summary": route.summary,
        "tags": [route.label],
        "responses": {
            str(route.status): {"description": "Answered.", **_content(schema(route.answer), route.content)},
            "4XX": {"$ref": "#/components/responses/Refused"},
            "5XX": {"$ref": "#/components/responses/Failed"},
        },
    }
    if route.headers:
        operation["responses"][str(route.status)]["headers"] = route.headers
    if route.parameters:
        operation["parameters"] = list(route.parameters)
    if route.body is not None:
        operation["requestBody"] = {"required": True, **_content(schema(route.body))}
    return operation


def _content(schema: Schema, media: str = "application/json") -> Schema:
    return {"content": {media: {"schema": schema}}}
