"""The ranker's own endpoint: a history of item keys in, the best next items out.

    POST /v1/recommend {"user": "u", "history": ["numpy", "pandas"], "k": 10}
    {"items": [{"item": "scipy", "score": 7.1}, ...], "ignored": []}

    GET /v1/recommend?user=u&k=10     the same from the user's own history, without what it holds

Items that the model does not know are ignored and named in the answer. Without any known item the answer is the most
popular items, all with score 0. It reads items.json of the package: max_length, and the keys in the order of their ids,
which is the order of popularity.
"""

# B batch, T time, K items in an answer
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from slipway import artifacts
from slipway.errors import DataError, ModelError, RequestError
from slipway.workloads.base import Array, Endpoint, Query, Tensors, parse, stack

MAX_HISTORY, MAX_KEY, MAX_K, MAX_IGNORED = 10_000, 512, 100, 20
NO_SCORE = -1e6
"""What is padding or excluded bears minus infinity, or a huge negative number."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a request."""

    history: Annotated[list[Annotated[str, Meta(max_length=MAX_KEY)] | int], Meta(max_length=MAX_HISTORY)]
    """Keys of the user's items, oldest first; of a long history the last items count."""
    k: Annotated[int, Meta(ge=1, le=MAX_K)] = 10
    """Items wanted."""
    user: Annotated[str, Meta(max_length=MAX_KEY)] | int | None = None
    """The user's key; the model does not look at it."""


class Scored(TypedDict):
    """An item and its score, which has no unit."""

    item: str
    score: float


class Answer(TypedDict):
    """The best items, best first, and keys of the history that the model does not know."""

    items: list[Scored]
    ignored: list[str | int]


class RankerEndpoint:
    """Turns keys into ids and back; see `workloads.base.Endpoint`."""

    path = "/v1/recommend"
    outputs: Sequence[str] = ("items", "scores")
    slow = False
    request = Request
    answer = Answer
    max_k = MAX_K

    def __init__(self, folder: Path) -> None:
        try:
            known = artifacts.read_json(folder / "items.json")
            self._max_length = int(known["max_length"])
            self._keys = [str(key) for key in known["keys"]]
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / 'items.json'}: unreadable ({error}); register the model again") from error
        self._ids: dict[str | int, int] = {key: number for number, key in enumerate(self._keys, 1)}
        self._decoder = msgspec.json.Decoder(Request)

    def decode(self, body: bytes) -> Query:
        """Look up the ids of the last `max_length` known items."""
        request = parse(self._decoder, body)
        ids, ignored = self._look_up(request.history)
        return self._query(ids, {"k": request.k, "ignored": ignored})

    def personal(self, seen: Sequence[str], k: int) -> Query:
        """Ask with the last `max_length` items; the model masks those, `encode` what is older."""
        ids, ignored = self._look_up(seen)
        return self._query(ids, {"k": k, "ignored": ignored, "seen": sorted(set(ids))})

    def _look_up(self, keys: Sequence[str | int]) -> tuple[list[int], list[str | int]]:
        known = self._ids
        with suppress(KeyError):  # nearly always all are known, and texts
            return [known[key] for key in keys], []
        ids: list[int] = []
        ignored: dict[str | int, None] = {}
        for key in keys:
            number = self._ids.get(key if isinstance(key, str) else str(key))
            if number is not None:
                ids.append(number)
            elif len(ignored) < MAX_IGNORED:
                ignored[key] = None
        return ids, list(ignored)

    def _query(self, ids: Sequence[int], asked: Mapping[str, Any]) -> Query:
        return Query({"history": np.array(ids[-self._max_length :], dtype=np.int64)}, asked)

    def check(self, inputs: Tensors) -> None:
        """Hold a raw history against the model's length and the ids it knows."""
        history = inputs["history"]
        if not 1 <= len(history) <= self._max_length:
            raise RequestError(f"history: expected 1..{self._max_length} items a row, got {len(history)}")
        low, high = int(history.min()), int(history.max())
        if low < 0 or high > len(self._keys):
            wrong = low if low < 0 else high
            raise RequestError(f"history: expected ids in 0..{len(self._keys)} (0: padding), got {wrong}")

    def collate(self, queries: Sequence[Query]) -> Tensors:
        """Pad on the left: history [B, T] int64, T at least 1."""
        rows: list[Array] = [query.inputs["history"] for query in queries]
        return {"history": stack(rows, max(1, max(len(row) for row in rows)))}

    def encode(self, query: Query, outputs: Tensors) -> Mapping[str, Any]:
        """Name the first k of items [K] and scores [K]; popular items where the history is empty.

        Nothing that was `seen`: of the model's items the others, then popular ones, with score 0.
        """
        if "seen" in query.asked:
            return self._unseen(query, outputs)
        k, ignored = query.asked["k"], query.asked["ignored"]
        if not len(query.inputs["history"]):
            return {"items": [{"item": key, "score": 0.0} for key in self._keys[:k]], "ignored": ignored}
        ids, scores = outputs["items"][:k].tolist(), outputs["scores"][:k].tolist()
        keys = self._keys
        best: Iterable[tuple[int, float]] = zip(ids, scores, strict=True)
        if min(ids) <= 0 or min(scores) <= NO_SCORE:  # a small catalogue runs out
            best = ((number, score) for number, score in best if number > 0 and score > NO_SCORE)
        return {"items": [{"item": keys[number - 1], "score": score} for number, score in best], "ignored": ignored}

    def _unseen(self, query: Query, outputs: Tensors) -> Mapping[str, Any]:
        k, left_out = query.asked["k"], set(query.asked["seen"])
        best: list[Scored] = []
        if len(query.inputs["history"]):
            for number, score in zip(outputs["items"].tolist(), outputs["scores"].tolist(), strict=True):
                if len(best) < k and number > 0 and score > NO_SCORE and number not in left_out:
                    best.append({"item": self._keys[number - 1], "score": score})
                    left_out.add(number)
        popular = (number for number in range(1, len(self._keys) + 1) if number not in left_out)
        best += [{"item": self._keys[number - 1], "score": 0.0} for number in islice(popular, k - len(best))]
        return {"items": best, "ignored": query.asked["ignored"]}

    def shown(self, answer: Mapping[str, Any]) -> Sequence[str]:
        """Keys of the answer's items."""
        return [item["item"] for item in answer["items"]]


ENDPOINT: Callable[[Path], Endpoint] = RankerEndpoint
