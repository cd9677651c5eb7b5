"""A text file, or a folder of them, as requests: for every document the likeliest next tokens after its end.

A document is what it is for `ingest`: a file, or a piece of a long one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from slipway.params import Params
from slipway.workloads.base import Query, Requests
from slipway.workloads.llm import sources
from slipway.workloads.llm.schema import LlmEndpoint


def requests(params: Params, package: Path, work: Path, k: int) -> Requests:
    """List `params.ingest.source`.

    Raises:
        DataError: there is nothing to read.
    """
    source, endpoint = sources.find(params.ingest.source), LlmEndpoint(package)

    def query(data: bytes) -> Query | None:
        try:
            text = data.decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            return None
        return endpoint.decode(json.dumps({"text": text, "k": k}).encode())

    def read(start: int) -> Iterator[tuple[str, Query | None]]:
        for document in islice(source.documents(), start, None):
            yield document.name, query(document.data)

    return Requests("document", "tokens", {"token": "string", "probability": "float64"}, None, read)
