"""Something that is looked at again and again while a load runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slipway.platforms.local import gateway
from slipway.platforms.local.layout import here


@contextmanager
def looking(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `look` from a thread of its own as long as the block runs, `every_s` after it returned."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def asked() -> frozenset[str]:
    """Addresses of the replicas that the gateway asks now."""
    return frozenset(address for address, one in gateway.state(here())["replicas"].items() if one["ready"])
