"""The first level: entries in the process, at most so many bytes of them, kept by W-TinyLFU.

A newcomer enters a small window. What falls out of it has to be asked for more often than what it would displace from
the main part, whose entries that were asked for again are protected. How often is estimated by a count-min sketch that
is halved now and then, so that old fame fades (Einziger, Friedman, Manes 2017, TinyLFU, arXiv:1512.00727).

The package theine does this by number of entries, without telling which it drops; answers differ in size by a
hundredfold, so here all is counted in bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from slipway.serving.cache.entry import Entry

OVERHEAD_BYTES: Final = 600
"""What an entry takes beside its body: objects, lists, and its place in the dictionaries."""
WINDOW: Final = 0.01
PROTECTED: Final = 0.8
"""Of the main part."""
ROWS: Final = 4
MOST: Final = 15
"""Highest count: four bits' worth tells the frequent from the rare."""


class Sketch:
    """How often keys came, roughly; never less than in truth since the last halving, up to 15."""

    def __init__(self, width: int) -> None:
        self._mask = (1 << max(8, width.bit_length())) - 1
        self._rows = [bytearray(self._mask + 1) for _ in range(ROWS)]
        self._left = self._period = 10 * (self._mask + 1)

    def add(self, key: bytes) -> None:
        """One more."""
        bits = int.from_bytes(key, "little")  # a digest: each piece of it is a hash of its own
        for row in self._rows:
            at = bits & self._mask
            if row[at] < MOST:
                row[at] += 1
            bits >>= 32
        self._left -= 1
        if not self._left:
            self._left = self._period
            self._rows = [row.translate(_HALVES) for row in self._rows]

    def count(self, key: bytes) -> int:
        """Estimate."""
        bits, least = int.from_bytes(key, "little"), MOST
        for row in self._rows:
            least = min(least, row[bits & self._mask])
            bits >>= 32
        return least


_HALVES = bytes(value >> 1 for value in range(256))


class Memory:
    """Entries by key, never more than `limit_bytes` of them.

    Args:
        limit_bytes: budget; an entry over the window's share of it may still live in the main part.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._window_limit = limit_bytes, int(limit_bytes * WINDOW)
        self._protected_limit = int((limit_bytes - self._window_limit) * PROTECTED)
        self._window: OrderedDict[bytes, Entry] = OrderedDict()
        self._probation: OrderedDict[bytes, Entry] = OrderedDict()
        self._protected: OrderedDict[bytes, Entry] = OrderedDict()
        self._window_bytes = self._main_bytes = self._protected_bytes = 0
        self._sketch = Sketch(limit_bytes // 1024)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._window) + len(self._probation) + len(self._protected)

    @property
    def size_bytes(self) -> int:
        """What is held now."""
        return self._window_bytes + self._main_bytes

    def get(self, key: bytes) -> Entry | None:
        """Look an entry up, which makes it likelier to stay."""
        self._sketch.add(key)
        entry = self._protected.get(key)
        if entry is not None:
            self._protected.move_to_end(key)
            return entry
        entry = self._window.get(key)
        if entry is not None:
            self._window.move_to_end(key)
            return entry
        entry = self._probation.pop(key, None)
        if entry is not None:
            self._protect(key, entry)
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep an entry, if it is worth more than what it would displace."""
        self.drop(key)
        self._window[key] = entry
        self._window_bytes += size_of(entry)
        while self._window_bytes > self._window_limit:
            candidate, moved = self._window.popitem(last=False)
            self._window_bytes -= size_of(moved)
            self._admit(candidate, moved)

    def drop(self, key: bytes) -> None:
        """Forget one."""
        if (entry := self._window.pop(key, None)) is not None:
            self._window_bytes -= size_of(entry)
        elif (entry := self._probation.pop(key, None)) is not None:
            self._main_bytes -= size_of(entry)
        elif (entry := self._protected.pop(key, None)) is not None:
            self._main_bytes -= size_of(entry)
            self._protected_bytes -= size_of(entry)

    def _protect(self, key: bytes, entry: Entry) -> None:
        self._protected[key] = entry
        self._protected_bytes += size_of(entry)
        while self._protected_bytes > self._protected_limit:
            demoted, moved = self._protected.popitem(last=False)
            self._protected_bytes -= size_of(moved)
            self._probation[demoted] = moved

    def _admit(self, key: bytes, entry: Entry) -> None:
        """Let a candidate into the main part if it beats each one that has to go for it."""
        size, room = size_of(entry), self._limit - self._window_limit
        if size > room:
            return
        often = self._sketch.count(key)
        while self._main_bytes + size > room:
            victim = next(iter(self._probation or self._protected))
            if self._sketch.count(victim) >= often:
                return
            self.drop(victim)
        self._probation[key] = entry
        self._main_bytes += size


def size_of(entry: Entry) -> int:
    """Bytes that an entry takes."""
    return OVERHEAD_BYTES + len(entry.body) + sum(map(len, entry.shown))
