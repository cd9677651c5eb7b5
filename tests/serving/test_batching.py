"""The batcher alone: with engines that are slow or fail on purpose, and its laws on a clock that is simulated."""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import load
from slipway.errors import DeadlineError, OverloadError, TransientError
from slipway.serving.batching import LOOK_S, Batch, Batcher, Job, Worker
from slipway.serving.pace import Pace


class Watch:
    """Remembers what the batcher tells."""

    def __init__(self) -> None:
        self.waits = 0
        self.sizes: list[int] = []

    def left(self, waited_s: Sequence[float]) -> None:
        assert waited_s == sorted(waited_s, reverse=True)
        assert waited_s[-1] >= 0
        self.waits += len(waited_s)

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


@pytest.mark.parametrize("max_wait_s", [0.0, 0.0002])
def test_who_comes_as_the_engine_falls_asleep_is_not_forgotten(max_wait_s: float) -> None:
    def engine(samples: Sequence[int]) -> list[int]:
        time.sleep(0.00002 * (samples[0] % 11))
        return [2 * sample for sample in samples]

    async def test(batcher: Batcher[int, int]) -> None:
        for n in range(1000):  # nobody comes after the second, whose request would wake the engine for his
            first = submit(batcher, n)
            for _ in range(n % 17):
                await asyncio.sleep(0)
            assert await batcher.submit([-n]) == [-2 * n]
            assert await first == [2 * n]

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the threads change after nearly every step
    try:
        run(test, engine, max_wait_s=max_wait_s)
    finally:
        sys.setswitchinterval(interval_s)


def test_it_tells_beforehand_what_would_be_late() -> None:
    gate = Gate(is_open=False)

    async def test(batcher: Batcher[int, int]) -> None:
        assert not batcher.late(1, 0.0)  # idle
        first = submit(batcher, 0)
        await until(lambda: gate.batches == [[0]])
        assert not batcher.late(1, 0.02)  # nothing is known of the engine yet
        await asyncio.sleep(0.05)
        gate.open.set()
        await first
        gate.open.clear()
        second = submit(batcher, 1)
        await until(lambda: len(gate.batches) == 2)
        assert batcher.late(1, 0.02)
        assert not batcher.late(1, 60)
        assert not batcher.late(1, math.inf)
        waiting = [submit(batcher, n) for n in (2, 3)]
        await until(lambda: len(batcher) == 2)
        assert batcher.late(1, math.inf)  # the queue is full
        gate.open.set()
        await asyncio.gather(second, *waiting)
        assert not batcher.late(1, 0.0)

    run(test, gate, max_queue=2)


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


def test_who_put_samples_is_told_once_and_nothing_after_he_gave_up() -> None:
    gate = Gate(is_open=False)
    told: list[tuple[str, Any]] = []

    async def test(batcher: Batcher[int, int]) -> None:
        def put(name: str, sample: int) -> Job[int, int]:
            return batcher.put([sample], math.inf, lambda outcome: told.append((name, outcome)))

        runs = put("runs", 1)
        await until(lambda: gate.batches == [[1]])
        waits, bad, good = put("waits", 2), put("bad", -1), put("good", 3)
        waits.cancel()
        runs.cancel()  # too late for the engine, in time for its owner
        assert len(batcher) == 2
        gate.open.set()
        await until(lambda: len(told) == 2)
        (_, error), (_, results) = told
        assert isinstance(error, ValueError)
        assert results == [6]
        for job in (runs, waits, bad, good):
            job.settle([0])
        assert [name for name, _ in told] == ["bad", "good"]

    run(test, gate)


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


def test_a_stalled_engine_is_told_of_and_those_who_waited_for_it_get_their_answer_in_time() -> None:
    gate = Gate(is_open=False)

    async def test(batcher: Batcher[int, int]) -> None:
        assert batcher.ails == ""
        late = [asyncio.create_task(batcher.submit([n], time.monotonic() + 0.1)) for n in (1, 2)]
        for task in late:
            with pytest.raises(DeadlineError, match="its time was up"):
                await task
        await until(lambda: "the engine has not come back for" in batcher.ails)
        gate.open.set()
        await until(lambda: batcher.ails == "")
        assert await batcher.submit([3]) == [6]

    run(test, gate, max_batch=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_told_of_and_nobody_waits_for_it() -> None:
    def dies(samples: Sequence[int]) -> list[int]:
        raise SystemExit

    async def test(batcher: Batcher[int, int]) -> None:
        waiting = [submit(batcher, n) for n in (1, 2)]
        for task in waiting:
            with pytest.raises(TransientError, match="dead"):
                await task
        assert "dead" in batcher.ails
        with pytest.raises(TransientError, match="dead"):
            await batcher.submit([3])

    run(test, dies, max_batch=1)


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer, so that hours pass in a moment and nothing is ever late."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        wait = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> Any:
            self.now += timeout or 0.0
            return wait(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


BASE_S, EACH_S = 0.00105, 0.000135


class Simulated(Worker[int, int]):
    """An engine that takes `BASE_S` for a run and `EACH_S` for a sample, by the loop's clock."""

    def __init__(self, clock: Clock, runs: list[tuple[float, int]], take: Any, run: Any, done: Any) -> None:
        self._clock, self._runs = clock, runs
        self._take, self._run, self._done = take, run, done
        self.alive, self._busy = True, False

    def wake(self) -> None:
        if not self._busy:
            self._begin(self._take())

    def _begin(self, batch: Batch[int, int] | None) -> None:
        self._busy = batch is not None
        if batch is not None:
            self._runs.append((self._clock.now, batch.size))
            self._clock.call_later(BASE_S + EACH_S * batch.size, self._end, batch)

    def _end(self, batch: Batch[int, int]) -> None:
        self._run(batch)
        following = self._take()
        self._done(batch)
        self._begin(following)

    def close(self) -> None:
        pass


@dataclass
class Seen:
    """What became of the requests of a simulation."""

    runs: list[tuple[float, int]]
    """Begin and samples of each run."""
    good: list[tuple[float, float]]
    """Arrival and end of each that was answered."""
    late: list[tuple[float, float]]
    """Arrival and end of each whose time was up."""
    refused: list[tuple[float, float]]
    """Arrival and end of each that was not taken."""


def simulate(
    arrivals: Sequence[tuple[float, int]],
    deadline_s: float = math.inf,
    max_batch: int = 32,
    max_wait_s: float = 0.0,
    max_queue: int = 512,
) -> Seen:
    """Send requests at moments, each of some samples."""
    clock = Clock()
    seen = Seen([], [], [], [])

    async def ask(batcher: Batcher[int, int], samples: int) -> None:
        began = clock.now
        try:
            assert await batcher.submit(range(samples), began + deadline_s) == [2 * n for n in range(samples)]
            seen.good.append((began, clock.now))
        except DeadlineError:
            seen.late.append((began, clock.now))
        except OverloadError:
            seen.refused.append((began, clock.now))

    async def body() -> None:
        worker = partial(Simulated, clock, seen.runs)
        batcher: Batcher[int, int] = Batcher(
            lambda samples: [2 * n for n in samples], max_batch, max_wait_s, max_queue, Watch(), worker, clock.time
        )
        tasks = []
        for moment, samples in arrivals:
            await asyncio.sleep(moment - clock.now)
            tasks.append(asyncio.create_task(ask(batcher, samples)))
        await asyncio.gather(*tasks)
        assert len(batcher) == 0

    try:
        clock.run_until_complete(body())
    finally:
        clock.close()
    return seen


def users(rate_rps: float, seconds: float, seed: int = 0) -> list[tuple[float, int]]:
    return [(moment, 1) for moment in load.poisson(rate_rps, seconds, seed).tolist()]


traffic = st.lists(st.tuples(st.floats(0, 0.004), st.integers(1, 4)), min_size=1, max_size=80)


@settings(max_examples=40, deadline=None)
@given(
    gaps=traffic,
    deadline_s=st.sampled_from([0.002, 0.005, 0.02, math.inf]),
    max_wait_s=st.sampled_from([0.0, 0.001, 0.005]),
    max_queue=st.integers(1, 40),
)
def test_every_request_has_one_end_in_time_and_batches_keep_their_bounds(
    gaps: list[tuple[float, int]], deadline_s: float, max_wait_s: float, max_queue: int
) -> None:
    moments = itertools.accumulate(gap for gap, _ in gaps)
    arrivals = [(moment, samples) for moment, (_, samples) in zip(moments, gaps, strict=True)]
    seen = simulate(arrivals, deadline_s, 8, max_wait_s, max_queue)
    assert len(seen.good) + len(seen.late) + len(seen.refused) == len(arrivals)
    assert all(1 <= size <= 8 for _, size in seen.runs)
    # One run, which none of them can shorten, may have begun before a request's end was known.
    assert all(end - began <= deadline_s + LOOK_S + 1e-9 for began, end in (*seen.good, *seen.late, *seen.refused))
    for (one, size), (other, _) in itertools.pairwise(seen.runs):
        assert other - one >= BASE_S + EACH_S * size - 1e-9, "two runs at once"
    if not max_wait_s and deadline_s == math.inf and not seen.refused:
        for began, _ in seen.good:  # work-conserving: an idle engine starts at once
            idle = not any(one <= began < one + BASE_S + EACH_S * size for one, size in seen.runs)
            assert not idle or any(one == pytest.approx(began) for one, _ in seen.runs)


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0, 3.0])
def test_as_much_is_answered_in_time_at_three_times_saturation(times: float) -> None:
    saturation_rps = 32 / (BASE_S + 32 * EACH_S)
    seen = simulate(users(times * saturation_rps, 0.5), deadline_s=0.05)
    in_time = [began for began, end in seen.good if end - began <= 0.05 and began > 0.1]
    assert len(in_time) / 0.4 > 0.93 * min(times, 1.0) * saturation_rps
    if times > 1:
        at_once = sum(end - began < 0.001 for began, end in seen.refused)
        assert at_once > 0.99 * (len(seen.late) + len(seen.refused)), "refused late, not early"


def test_the_window_halves_the_runs_at_middle_load_and_costs_sparse_users_nothing() -> None:
    window_s = 0.004
    for rate_rps in (20, 1500):
        plain, waits = (simulate(users(rate_rps, 2.0), max_wait_s=w) for w in (0.0, window_s))
        times = [sorted(end - began for began, end in seen.good) for seen in (plain, waits)]
        p50, p99 = ([ms[int(q * len(ms))] for ms in times] for q in (0.5, 0.99))
        if rate_rps == 20:
            assert p50[1] == pytest.approx(p50[0], rel=0.01)
        else:
            assert len(waits.runs) < 0.6 * len(plain.runs)
            assert p99[1] < p99[0] + window_s


@settings(max_examples=50, deadline=None)
@given(
    base_s=st.floats(0.0001, 0.01), each_s=st.floats(0.00001, 0.001), sizes=st.lists(st.integers(1, 32), min_size=20)
)
def test_the_time_of_a_run_is_learned_from_runs(base_s: float, each_s: float, sizes: list[int]) -> None:
    pace = Pace(32, 0.0)
    for size in (1, 32, *sizes):
        pace.ran(size, base_s + each_s * size)
    for size in {1, 32, *sizes}:
        assert pace.takes_s(size) == pytest.approx(base_s + each_s * size, rel=1e-3)


def test_who_was_slow_once_is_asked_again() -> None:
    pace = Pace(32, 0.0)
    for _ in range(10):
        pace.ran(1, 3.0)
    for _ in range(100):
        pace.ran(1, 0.001)
    assert pace.takes_s(1) < 0.0011
