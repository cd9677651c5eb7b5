"""The llm's own endpoint: a text in, the likeliest next tokens out.

    POST /v1/complete {"text": "import numpy as", "k": 5}
    {"tokens": [{"token": " np", "probability": 0.93}, ...], "read": 4}

Of a long text the last tokens count, as many as the model sees; `read` tells how many. It reads tokenizer.json and
llm.json of the package: context_length.
"""

# B batch, T time, K tokens in an answer
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from slipway import artifacts
from slipway.errors import DataError, ModelError, RequestError
from slipway.workloads.base import Endpoint, Query, Tensors, parse
from slipway.workloads.llm.tokenizer import TOKENIZER, Tokens

ABOUT = "llm.json"
MAX_TEXT, MAX_K = 1_000_000, 50
PADDING = -1


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a request."""

    text: Annotated[str, Meta(max_length=MAX_TEXT)]
    """What is to be continued."""
    k: Annotated[int, Meta(ge=1, le=MAX_K)] = 5
    """Tokens wanted."""


class Likely(TypedDict):
    """A token and its probability, 0..1."""

    token: str
    probability: float


class Answer(TypedDict):
    """The likeliest next tokens, likeliest first, and how many tokens of the text were read."""

    tokens: list[Likely]
    read: int


class LlmEndpoint:
    """Turns texts into tokens and back; see `workloads.base.Endpoint`."""

    path = "/v1/complete"
    outputs: Sequence[str] = ("next", "log_probs")
    slow = False
    request = Request
    answer = Answer

    def __init__(self, folder: Path) -> None:
        try:
            self._length = int(artifacts.read_json(folder / ABOUT)["context_length"])
            self._tokens = Tokens.load(folder / TOKENIZER)
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder}: unreadable ({error}); register the model again") from error
        self._decoder = msgspec.json.Decoder(Request)

    def decode(self, body: bytes) -> Query:
        """Cut the text into tokens; before its first stands the end of the text before it, as in training."""
        request = parse(self._decoder, body)
        try:
            (ids,) = self._tokens.encode([request.text])
        except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
            raise RequestError(f"text: not valid Unicode ({error.reason})") from error
        tokens = np.array([self._tokens.end, *ids][-self._length :], dtype=np.int64)
        return Query({"tokens": tokens}, {"k": request.k})

    def check(self, inputs: Tensors) -> None:
        """Hold raw tokens against the model's length and vocabulary; padding may stand on the right."""
        tokens = inputs["tokens"]
        real = tokens[: int((tokens != PADDING).sum())]
        if not 1 <= len(tokens) <= self._length or not len(real):
            raise RequestError(f"tokens: expected 1..{self._length} tokens a row, got {len(real)} of {len(tokens)}")
        low, high = int(real.min()), int(real.max())
        if low < 0 or high >= self._tokens.vocabulary:
            wrong = low if low < 0 else high
            most = self._tokens.vocabulary - 1
            raise RequestError(f"tokens: expected ids in 0..{most}, padded with {PADDING} on the right, got {wrong}")

    def collate(self, queries: Sequence[Query]) -> Tensors:
        """Pad on the right: tokens [B, T] int64."""
        rows = [query.inputs["tokens"] for query in queries]
        return {"tokens": padded(rows)}

    def encode(self, query: Query, outputs: Tensors) -> Mapping[str, Any]:
        """Name the first k of next [K] and log_probs [K]."""
        k = query.asked["k"]
        ids, scores = outputs["next"][:k].tolist(), outputs["log_probs"][:k].tolist()
        found = [
            {"token": self._tokens.text([number]), "probability": math.exp(score)}
            for number, score in zip(ids, scores, strict=True)
        ]
        return {"tokens": found, "read": len(query.inputs["tokens"])}

    def shown(self, answer: Mapping[str, Any]) -> Sequence[str]:
        """Texts of the answer's tokens."""
        return [token["token"] for token in answer["tokens"]]


def padded(rows: Sequence[Any]) -> Any:
    """Stack rows of unequal length, padded on the right: [B, T] int64."""
    out = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


ENDPOINT: Callable[[Path], Endpoint] = LlmEndpoint
