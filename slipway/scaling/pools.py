"""Pools that sleep: of two pools for realtime requests the champion has replicas in those alone that its users need.

The gateway measures the rate, says which pool is wanted, and moves users only to replicas that are ready; so a pool
wakes as soon as it is wanted, and until it is there the other one serves as before. It falls asleep when it has been
neither wanted nor used for a while. Should the pool that is needed have no ready replica, the other one wakes, too.
Beside a canary none falls asleep, and other versions are left alone: a candidate comes up with all pools, and what is
kept warm for a rollback keeps those that it had.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from slipway.errors import PlatformError
from slipway.platforms.base import Platform

UNUSED_S = 8.0
"""Not sooner does a pool fall asleep: a gateway that was started anew knows the rate of 5 whole seconds after up to 6,
and a look comes every second; with less a pool could fall asleep in the moment in which it is found to be needed."""

log = logging.getLogger(__name__)


class Pools:
    """Lets pools of the champion sleep, and wakes them.

    Args:
        platform: where the replicas are.
        ready_timeout_s: longest wait for replicas that wake.
        clock: moments, s.
    """

    def __init__(self, platform: Platform, ready_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._platform, self._ready_timeout_s, self._clock = platform, ready_timeout_s, clock
        self._used: dict[str, float] = {}

    def look(self) -> int:
        """Decide once, and act if there is need; how many pools woke (negative: fell asleep).

        Raises:
            PlatformError: the gateway is silent, or a pool did not wake, so that users stay where they are; the next
                look tries again.
        """
        try:
            in_use = self._platform.pools_in_use()
        except PlatformError:
            self._used = {}  # of a gateway that was away nobody knows what was used meanwhile
            raise
        status = self._platform.status()
        version, now = status.routing.champion, self._clock()
        replicas = status.replicas.get(version or "", ())
        awake = {replica.pool for replica in replicas} & in_use.keys()
        if version is None or not awake:  # nobody serves, or by replicas from before there were these pools
            return 0
        needed = {pool for pool, used in in_use.items() if used}
        lacking = needed - {replica.pool for replica in replicas if replica.ready}
        self._used = {pool: now if used or lacking else self._used.get(pool, now) for pool, used in in_use.items()}
        kept = awake if status.routing.canary else {pool for pool in awake if now - self._used[pool] < UNUSED_S}
        wanted = set(in_use) if lacking else needed | kept
        if wanted == awake and not lacking:
            return 0
        self._platform.let_sleep(version, set(in_use) - wanted, self._ready_timeout_s)
        if wanted != awake:
            log.info(
                "pools awake version=%s pools=%s->%s seconds=%.1f",
                *(version, ",".join(sorted(awake)), ",".join(sorted(wanted)), self._clock() - now),
            )
        return len(wanted) - len(awake)
