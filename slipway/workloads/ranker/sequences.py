"""The ranker's data between stages: every user's items in order, in columns that are mapped into memory, not read.

    offsets.npy      int64 [U+1]  user u's events are offsets[u] .. offsets[u+1]
    items.npy        int32 [E]    item ids 1..I, sorted by user, then time; 0 is kept for padding
    times.npy        int64 [E]    time of each event, where the source has one
    users.parquet    one row a user, in the order of offsets: key (string)
    items.parquet    one row an item, in the order of ids from 1: key (string), events (int64)
    meta.json        source, rows read, events, users, items; written last

The item with id i is row i - 1 of items.parquet.
"""

# U users, E events, I items, B rows, T time
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.errors import DataError


@dataclass(frozen=True)
class Sequences:
    """The columns of a folder that `ingest` wrote."""

    folder: Path
    offsets: npt.NDArray[np.int64]
    """[U+1]"""
    items: npt.NDArray[np.int32]
    """[E]"""
    times: npt.NDArray[np.int64] | None
    """[E], or None: the source had no time."""
    meta: dict[str, Any]

    @property
    def user_count(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def item_count(self) -> int:
        """I: ids run from 1 to I."""
        return int(self.meta["items"])

    def of(self, user: int) -> npt.NDArray[np.int32]:
        """Items of one user (0..U-1), oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    @cached_property
    def item_keys(self) -> list[str]:
        """Key of every item as the source wrote it; the item with id i is item_keys[i - 1]."""
        return self._table("items.parquet", "key")

    @cached_property
    def item_events(self) -> npt.NDArray[np.int64]:
        """[I] number of events of every item; the item with id i is item_events[i - 1]."""
        return np.asarray(self._table("items.parquet", "events"), dtype=np.int64)

    @cached_property
    def user_keys(self) -> list[str]:
        """Key of every user as the source wrote it."""
        return self._table("users.parquet", "key")

    def _table(self, name: str, column: str) -> list[Any]:
        import pyarrow.parquet

        values: list[Any] = pyarrow.parquet.read_table(self.folder / name, columns=[column])[column].to_pylist()
        return values


def load(folder: Path) -> Sequences:
    """Map the columns of `folder` into memory.

    Raises:
        DataError: a file is missing, torn, or does not fit the others; names it.
    """
    meta = artifacts.read_json(folder / "meta.json")
    try:
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        items = np.load(folder / "items.npy", mmap_mode="r")
        times = np.load(folder / "times.npy", mmap_mode="r") if (folder / "times.npy").exists() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: torn or incomplete ({error}); run `python -m tasks.ingest` again") from error
    lengths = {int(offsets[-1]), len(items)} | ({len(times)} if times is not None else set())
    if len(offsets) != meta["users"] + 1 or len(lengths) != 1:
        raise DataError(f"{folder}: the columns do not fit one another; run `python -m tasks.ingest` again")
    return Sequences(folder, offsets, items, times, meta)


def padded(
    items: npt.NDArray[Any], begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64], limit: int = 1 << 30
) -> npt.NDArray[np.int64]:
    """Gather items[begin:end] of each row, padded with 0 on the left to the longest, at most `limit`: [B, T]."""
    length = max(1, min(int((end - begin).max(initial=1)), limit))
    place = end[:, None] - np.arange(length, 0, -1)
    inside = place >= begin[:, None]
    return np.where(inside, items[np.where(inside, place, 0)], 0).astype(np.int64)
