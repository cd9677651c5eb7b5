"""How fast requests come and how long the engine takes: what the batcher knows of the present, and decides by.

Pure arithmetic on moments that it is given, in seconds of any clock.
"""

from __future__ import annotations

import math

ARRIVALS, RUNS = 0.1, 0.1
"""Weight of the newest value in the moving averages of arrivals and of runs."""


class Pace:
    """Moving averages of arrivals and of the engine's time.

    Args:
        max_batch: most samples in one run.
        max_wait_s: longest that an idle engine may wait for company; 0: it never waits.
    """

    def __init__(self, max_batch: int, max_wait_s: float) -> None:
        self._max_batch, self._max_wait_s = max_batch, max_wait_s
        self._last = -math.inf
        self._interval_s = math.inf
        self._runs = 0
        self._size = self._seconds = self._size_size = self._size_seconds = 0.0
        self._base_s = self._each_s = self._full_s = 0.0

    def arrived(self, now: float, samples: int) -> None:
        """Count an arrival."""
        gap_s = min((now - self._last) / samples, 10 * self._max_wait_s)  # a night's pause is forgotten in a moment
        self._last = now
        known = self._interval_s < math.inf
        self._interval_s = self._interval_s + ARRIVALS * (gap_s - self._interval_s) if known else gap_s

    def ran(self, samples: int, seconds: float) -> None:
        """Learn from a run: an exponentially weighted regression of its time on its size."""
        self._runs += 1
        weight = max(RUNS, 1 / self._runs)
        self._size += weight * (samples - self._size)
        self._seconds += weight * (seconds - self._seconds)
        self._size_size += weight * (samples * samples - self._size_size)
        self._size_seconds += weight * (samples * seconds - self._size_seconds)
        spread = self._size_size - self._size**2
        slope = (self._size_seconds - self._size * self._seconds) / spread if spread > 1e-9 else 0.0
        self._each_s = min(max(slope, 0.0), self._seconds / self._size)
        self._base_s = self._seconds - self._each_s * self._size
        self._full_s = self.takes_s(self._max_batch)

    def takes_s(self, samples: int) -> float:
        """Time of a run of so many samples; 0 as long as none was seen."""
        return self._base_s + self._each_s * samples

    def ready_in_s(self, ahead: int, samples: int, left_s: float) -> float:
        """Time until `samples` that come now would be done, behind `ahead` samples and `left_s` of the present run.

        All runs count as full, its own too: those who come later fill it.
        """
        most = self._max_batch
        return left_s + (ahead // most + 1 + (ahead % most + samples > most)) * self._full_s

    @property
    def worth(self) -> int:
        """Samples from which on a run is worth it: its fixed cost is no more than what its samples cost."""
        if self._each_s * self._max_batch <= self._base_s:
            return self._max_batch
        return max(1, math.ceil(self._base_s / self._each_s))

    def start(self, oldest: float, waiting: int, last_start: float) -> float:
        """When an idle engine should start on what waits; a moment that is over means now.

        It waits for as many arrivals as make a run worth it: no longer than they take, than it may, and than the
        earliest deadline allows. Where not even one more is to be expected in that time, it does not wait at all.

        Args:
            oldest: when the first of them came.
            waiting: samples that wait.
            last_start: last moment at which they can start and still be in time.
        """
        worth = self.worth
        if waiting >= worth or self._interval_s >= self._max_wait_s:
            return oldest
        return min(oldest + min(self._max_wait_s, worth * self._interval_s), last_start)
