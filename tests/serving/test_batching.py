"""The batcher alone, with engines that are slow or fail on purpose."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.errors import OverloadError
from slipway.serving.batching import Batcher


class Watch:
    """Remembers what the batcher tells."""

    def __init__(self) -> None:
        self.waits = 0
        self.sizes: list[int] = []

    def waited(self, seconds: float) -> None:
        assert seconds >= 0
        self.waits += 1

    def ran(self, samples: int, seconds: float) -> None:
        self.sizes.append(samples)


class Gate:
    """An engine that doubles its samples, once it is let; it raises on negative ones."""

    def __init__(self, is_open: bool = True) -> None:
        self.open = threading.Event()
        self.batches: list[list[int]] = []
        if is_open:
            self.open.set()

    def __call__(self, samples: Sequence[int]) -> list[int]:
        self.batches.append(list(samples))
        assert self.open.wait(10)
        if any(sample < 0 for sample in samples):
            raise ValueError("negative")
        return [2 * sample for sample in samples]


def run(
    test: Callable[[Batcher[int, int]], Awaitable[None]],
    engine: Callable[[Sequence[int]], list[int]],
    watch: Watch | None = None,
    max_batch: int = 4,
    max_wait_s: float = 0.0,
    max_queue: int = 100,
) -> None:
    async def body() -> None:
        batcher: Batcher[int, int] = Batcher(engine, max_batch, max_wait_s, max_queue, watch or Watch())
        try:
            await asyncio.wait_for(test(batcher), 20)
        finally:
            batcher.close()

    asyncio.run(body())


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


def submit(batcher: Batcher[int, int], *samples: int) -> asyncio.Task[list[int]]:
    return asyncio.create_task(batcher.submit(samples))


@given(groups=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_every_request_gets_its_own_results_however_batches_form(groups: list[list[int]]) -> None:
    gate, watch = Gate(), Watch()

    async def test(batcher: Batcher[int, int]) -> None:
        results = await asyncio.gather(*(batcher.submit(group) for group in groups))
        assert results == [[2 * sample for sample in group] for group in groups]

    run(test, gate, watch)
    assert max(len(batch) for batch in gate.batches) <= 4
    assert [sample for batch in gate.batches for sample in batch] == [s for group in groups for s in group]
    assert sum(watch.sizes) == sum(len(group) for group in groups)
    assert watch.waits == len(groups)


def test_what_comes_while_the_engine_is_busy_runs_together_next() -> None:
    gate = Gate(is_open=False)

    async def test(batcher: Batcher[int, int]) -> None:
        first = submit(batcher, 1)
        await until(lambda: gate.batches == [[1]])
        rest = [submit(batcher, n) for n in range(2, 8)]
        await until(lambda: len(batcher) == 6)
        gate.open.set()
        assert await asyncio.gather(first, *rest) == [[2 * n] for n in range(1, 8)]

    run(test, gate)
    assert gate.batches == [[1], [2, 3, 4, 5], [6, 7]]


def test_an_idle_engine_waits_for_company_if_told_to() -> None:
    gate = Gate()

    async def test(batcher: Batcher[int, int]) -> None:
        first = submit(batcher, 1)
        await asyncio.sleep(0.05)
        assert gate.batches == []
        assert list(await asyncio.gather(first, submit(batcher, 2))) == [[2], [4]]

    run(test, gate, max_batch=2, max_wait_s=60)
    assert gate.batches == [[1, 2]]


def test_an_idle_engine_does_not_wait_for_longer_than_that() -> None:
    took_s = []

    async def test(batcher: Batcher[int, int]) -> None:
        for _ in range(10):
            began = time.monotonic()
            assert await submit(batcher, 1) == [2]
            took_s.append(time.monotonic() - began)

    run(test, Gate(), max_wait_s=0.02)
    assert min(took_s) >= 0.02
    assert min(took_s) < 0.5, "a busy machine may have been late, but not each time"


def test_a_full_batch_waits_no_longer() -> None:
    gate = Gate()

    async def test(batcher: Batcher[int, int]) -> None:
        await asyncio.wait_for(asyncio.gather(*(batcher.submit([n]) for n in range(4))), 15)

    run(test, gate, max_wait_s=60)
    assert gate.batches == [[0, 1, 2, 3]]


def test_one_request_too_many_is_refused_at_once() -> None:
    gate = Gate(is_open=False)

    async def test(batcher: Batcher[int, int]) -> None:
        first = submit(batcher, 0)
        await until(lambda: gate.batches == [[0]])
        waiting = [submit(batcher, n) for n in (1, 2)]
        await until(lambda: len(batcher) == 2)
        with pytest.raises(OverloadError, match="2 requests are waiting"):
            await batcher.submit([3])
        gate.open.set()
        await asyncio.gather(first, *waiting)
        assert await batcher.submit([4]) == [8]

    run(test, gate, max_queue=2)


def test_a_request_that_nobody_waits_for_leaves_the_queue() -> None:
    gate = Gate(is_open=False)

    async def test(batcher: Batcher[int, int]) -> None:
        running = submit(batcher, 0)
        await until(lambda: gate.batches == [[0]])
        gone, stays = submit(batcher, 1), submit(batcher, 2)
        await until(lambda: len(batcher) == 2)
        gone.cancel()
        running.cancel()  # too late for the engine, but nobody gets the result
        await until(lambda: len(batcher) == 1)
        gate.open.set()
        assert await stays == [4]

    run(test, gate)
    assert gate.batches == [[0], [2]]


def test_only_the_guilty_request_of_a_failed_batch_fails() -> None:
    gate = Gate(is_open=False)

    async def test(batcher: Batcher[int, int]) -> None:
        first = submit(batcher, 0)
        await until(lambda: gate.batches == [[0]])
        mixed = [submit(batcher, n) for n in (1, -2, 3)]
        await until(lambda: len(batcher) == 3)
        gate.open.set()
        await first
        with pytest.raises(ValueError, match="negative"):
            await mixed[1]
        assert list(await asyncio.gather(mixed[0], mixed[2])) == [[2], [6]]
        assert await batcher.submit([5]) == [10]

    run(test, gate)
    assert gate.batches[1:4] == [[1, -2, 3], [1], [-2]]
