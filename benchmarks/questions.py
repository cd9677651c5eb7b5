"""What users of a ranker ask, by Zipf's law: the same few questions again and again, and many once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from benchmarks import load
from tests.serving import packages

PATH = "/v1/recommend"
ITEMS, LONGEST = 50_000, 50
EXPONENT = 1.0
History = Sequence[int]


def zipf(count: int, different: int, seed: int) -> list[bytes]:
    """Draw `count` requests, of so many different ones."""
    draw = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, different + 1) ** EXPONENT
    return [_request(question) for question in draw.choice(different, size=count, p=weights / weights.sum()).tolist()]


def history(question: int) -> History:
    """Give the items that a question holds, 1 to 50 of them."""
    draw = np.random.default_rng(question)
    items: list[int] = draw.integers(1, ITEMS + 1, size=draw.integers(1, LONGEST + 1)).tolist()
    return items


def body(items: History) -> dict[str, list[str]]:
    """Write a request's body."""
    return {"history": [packages.key(item) for item in items]}


@cache
def _request(question: int) -> bytes:
    return load.post(PATH, body(history(question)))
