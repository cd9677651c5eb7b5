"""supervisord, which starts a program that ended anew at once; as it comes, it does so up to two seconds later.

It is run as a file, `python -P keeper.py -c CONF`, and knows nothing of slipway.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from supervisor import supervisord


class Prompt(supervisord.Supervisor):  # type: ignore[misc]  # supervisor has no types
    """Hears of an end while it waits, and starts what ended in the same turn of its loop, not in the next one."""

    def runforever(self) -> None:
        """Turn until it is told to end; a turn waits up to a second for something to do."""
        # Python's poll() goes on waiting after SIGCHLD, unless something can be read then.
        self._woken, write = os.pipe()
        for end in (self._woken, write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        super().runforever()

    def reap(self, once: bool = False, recursionguard: int = 0) -> None:
        """Take note of every program that ended."""
        super().reap(once, recursionguard)
        for group in self.process_groups.values():
            group.transition()
        with suppress(BlockingIOError):
            os.read(self._woken, 4096)
        self.options.poller.register_readable(self._woken)  # the loop strikes off what it does not know


if __name__ == "__main__":
    supervisord.Supervisor = Prompt  # which its `main` makes
    supervisord.main()
