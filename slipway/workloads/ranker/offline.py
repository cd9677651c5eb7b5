"""A table of events as requests: for every user the best next items after all of their events."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slipway import artifacts
from slipway.params import Params
from slipway.workloads.base import Query, Requests
from slipway.workloads.ranker import ingest, sequences
from slipway.workloads.ranker.scoring import translation


def requests(params: Params, package: Path, work: Path, k: int) -> Requests:
    """Read `params.ingest.source` as `ingest` does, every user of it, into `work`, once.

    Raises:
        DataError: the source is no table of events, or a row is broken; names it.
    """
    folder = work / "sequences"
    if not folder.exists():
        found: dict[str, Any] = {}
        every = params.ingest.model_copy(update={"min_user_events": 1, "min_item_events": 1})
        with artifacts.writing(folder) as beside:
            ingest.ingest(params.model_copy(update={"ingest": every}), beside, found, least=1)
    data = sequences.load(folder)
    ids, longest = translation(data, package)

    def read(start: int) -> Iterator[tuple[str, Query]]:
        for user in range(start, data.user_count):
            history = ids[data.of(user)]
            yield data.user_keys[user], Query({"history": history[history > 0][-longest:]}, {"k": k, "ignored": []})

    return Requests("user", "items", {"item": "string", "score": "float64"}, data.user_count, read)
