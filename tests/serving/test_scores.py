from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from slipway import package
from slipway.serving import engines, scores
from slipway.workloads.base import Query
from slipway.workloads.ranker.schema import RankerEndpoint
from tests.serving import packages


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> RankerEndpoint:
    return RankerEndpoint(packages.seal(tmp_path_factory.mktemp("scores") / "package"))


def test_the_scores_of_like_requests_fall_into_each_tenth_alike(endpoint: RankerEndpoint, tmp_path: Path) -> None:
    sealed = package.load(packages.seal(tmp_path / "package"))
    engine = engines.of(sealed, 1)
    random = np.random.default_rng(0)

    def queries(count: int) -> list[Query]:
        return [Query({"history": random.integers(1, 300, size=5)}, {}) for _ in range(count)]

    bounds = scores.deciles(endpoint, lambda names, feed: engine.run(feed, list(names)), queries(1000))
    assert len(bounds) == 9
    seen: Counter[int] = Counter()
    watch = scores.Watch(bounds, "scores", [lambda tenth=tenth: seen.update([tenth]) for tenth in range(10)])  # type: ignore[misc]
    for query in queries(4000):
        (rows,) = engine.run(endpoint.collate([query]), ["scores"])
        if watch.due():
            watch.count(watch.tenth({"scores": rows[0]}))
    assert sum(seen.values()) == 4000 // scores.EVERY
    assert min(seen.values()) > 20, seen  # 50 each, give or take
    assert max(seen.values()) < 90, seen


def test_scores_that_are_all_alike_are_not_watched(endpoint: RankerEndpoint) -> None:
    def run(names: object, feed: object) -> list[np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
        return [np.ones((1, 3), np.float32)]

    assert scores.deciles(endpoint, run, [Query({"history": np.array([1])}, {})]) == ()
    assert scores.deciles(endpoint, run, []) == ()
    watch = scores.Watch((), "scores", ())
    assert not any(watch.due() for _ in range(2 * scores.EVERY))
    watch.count(watch.tenth({"scores": np.ones(3)}))
