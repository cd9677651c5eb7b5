"""What `validate` sees of the ranker's data: figures, frames in chunks, plots. Limits:  expectations.json."""

# U users, E events, I items
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slipway.reporting import PALETTE, Chapter, Note, Plot, Table, canvas
from slipway.validation import MAX_ROWS, Frame, Subject
from slipway.workloads.ranker import sequences

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 500_000
PSI_BINS = 20
MAX_PROFILE = 50_000
"""Items that an accepted version remembers one by one, the most popular; the rest are remembered as a sum."""
FLOOR = 1e-4
"""Least share in a bin of the stability index, where the logarithm of an empty one would be infinite."""


def examine(folder: Path, before: Mapping[str, Any] | None) -> Subject:
    """Look at the sequences of `folder`; `before` is the profile of the last accepted version of their source."""
    data = sequences.load(folder)
    rows, dropped = data.meta["rows"], data.meta["dropped"]
    events = len(data.items)
    figures = {
        "rows": rows,
        "events": events,
        "users": data.user_count,
        "items": data.item_count,
        "null_ratio": dropped["null"] / rows,
        "duplicate_ratio": dropped["duplicate"] / rows,
        "volume_ratio": None if before is None else events / before["events"],
        "psi": None if before is None else float(stability(data, before)[2].sum()),
    }
    frames = {
        "events": Frame(lambda: _events(data), ("event", "user", "item", "since")),
        "users": Frame(lambda: _users(data), ("key", "events")),
        "items": Frame(lambda: _items(data), ("id", "key", "events")),
    }
    profile = {
        "events": events,
        "keys": data.item_keys[:MAX_PROFILE],
        "counts": data.item_events[:MAX_PROFILE].tolist(),
    }
    suite, headline = Path(__file__).with_name("expectations.json"), ("rows", "events", "users", "items")
    return Subject(suite, frames, figures, _rejects(folder), profile, headline)


def _events(data: sequences.Sequences) -> Iterator[pd.DataFrame]:
    """Every event with its user, its item, and the time since the user's event before it (null where there is none)."""
    import pandas as pd

    for start in range(0, len(data.items), CHUNK):
        event = np.arange(start, min(start + CHUNK, len(data.items)))
        user = np.searchsorted(data.offsets, event, side="right") - 1
        since = np.full(len(event), np.nan)
        if data.times is not None:
            after = event > data.offsets[user]
            since[after] = data.times[event[after]] - data.times[event[after] - 1]
        yield pd.DataFrame({"event": event, "user": user, "item": data.items[event], "since": since})


def _users(data: sequences.Sequences) -> Iterator[pd.DataFrame]:
    for start, frame in _table(data.folder / "users.parquet", ["key"]):
        frame["events"] = np.diff(data.offsets[start : start + len(frame) + 1])
        yield frame


def _items(data: sequences.Sequences) -> Iterator[pd.DataFrame]:
    for start, frame in _table(data.folder / "items.parquet", ["key", "events"]):
        frame["id"] = np.arange(start + 1, start + len(frame) + 1)
        yield frame


def _table(path: Path, columns: list[str]) -> Iterator[tuple[int, pd.DataFrame]]:
    import pyarrow.parquet

    start = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK, columns=columns):
            yield start, batch.to_pandas()
            start += len(batch)


def _rejects(folder: Path) -> dict[str, list[dict[str, Any]]]:
    import pyarrow.parquet

    found: dict[str, list[dict[str, Any]]] = {}
    for row in pyarrow.parquet.read_table(folder / "rejects.parquet").to_pylist():
        rows = found.setdefault(row["reason"], [])
        if len(rows) < MAX_ROWS:
            rows.append(row)
    return found


def stability(
    data: sequences.Sequences, before: Mapping[str, Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Population stability index of the item distribution, bin by bin; the index is the sum of the parts.

    The bins are groups of items that had about the same share of events before, from the most popular on; the last bin
    is of all other items, those that are new among them.

    Returns: shares before, shares now, and parts of the index, each [PSI_BINS + 1].
    """
    counts = np.asarray(before["counts"], dtype=np.int64)
    middles = (np.cumsum(counts) - counts / 2) / counts.sum()
    bins = np.minimum((middles * PSI_BINS).astype(np.int64), PSI_BINS - 1)
    bin_of = dict(zip(before["keys"], bins.tolist(), strict=True))
    now_bins = np.fromiter((bin_of.get(key, PSI_BINS) for key in data.item_keys), np.int64, data.item_count)
    now = np.bincount(now_bins, weights=data.item_events, minlength=PSI_BINS + 1) / max(data.item_events.sum(), 1)
    then = np.append(np.bincount(bins, weights=counts, minlength=PSI_BINS), before["events"] - counts.sum())
    then = then / before["events"]
    p, q = np.maximum(now, FLOOR), np.maximum(then, FLOOR)
    return then, now, (p - q) * np.log(p / q)


def chapters(folder: Path, before: Mapping[str, Any] | None) -> list[Chapter]:
    """Show the sequences of `folder`, alone and against the last accepted version."""
    data = sequences.load(folder)
    shape: list[Table | Plot | Note] = [_lengths(data), _popularity(data), *_over_time(data), _favourites(data)]
    return [
        Chapter("What the data look like", shape),
        Chapter("Against the last accepted version", _drift(data, before)),
    ]


def _lengths(data: sequences.Sequences) -> Plot:
    lengths = np.diff(data.offsets)
    least, most = int(lengths.min()), max(int(np.quantile(lengths, 0.99)), int(lengths.min()) + 1)
    counts = np.bincount(np.minimum(lengths, most))[least:]
    figure, axes = canvas("events of a user; the last: this many or more", "users")
    axes.bar(least + np.arange(len(counts)), counts, width=1.0)
    return Plot(f"How long the sequences are: median {np.median(lengths):,.0f}, longest {lengths.max():,}", figure)


def _popularity(data: sequences.Sequences) -> Plot:
    ranks = np.unique(np.geomspace(1, data.item_count, 300).astype(int))
    figure, axes = canvas("rank of the item", "events of the item")
    axes.loglog(ranks, data.item_events[ranks - 1])
    tenth = data.item_events[: max(1, data.item_count // 10)].sum() / data.item_events.sum()
    return Plot(f"How popular the items are: the first tenth has {tenth:.0%} of the events", figure)


def _over_time(data: sequences.Sequences) -> list[Plot]:
    if data.times is None:
        return []
    counts, edges = _histogram(data.times)
    figure, axes = canvas("time", "events")
    instants: Any = edges[:-1]
    if data.meta["time_unit"] == "us":
        instants = edges[:-1].astype("datetime64[us]")
    axes.fill_between(instants, counts, alpha=0.35, linewidth=0)
    axes.plot(instants, counts)
    return [Plot("When the events were", figure)]


def _histogram(times: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count the times in 60 equal spans, in bounded memory; the edges are whole numbers."""
    edges = np.linspace(int(times.min()), int(times.max()) + 1, 61).astype(np.int64)
    counts = np.zeros(60, np.int64)
    for start in range(0, len(times), CHUNK):
        counts += np.histogram(times[start : start + CHUNK], edges)[0]
    return counts, edges


def _favourites(data: sequences.Sequences) -> Table:
    rows = list(zip(range(1, 11), data.item_keys[:10], data.item_events[:10].tolist(), strict=False))
    return Table("The most popular items", ("id", "item", "events"), rows)


def _drift(data: sequences.Sequences, before: Mapping[str, Any] | None) -> list[Note | Plot | Table]:
    if before is None:
        return [Note("No version of this source was accepted before: there is nothing to compare with.", "info")]
    then, now, parts = stability(data, before)
    figure, axes = canvas("items, from the most popular before; the last: all others", "share of events")
    places = np.arange(len(parts))
    axes.bar(places - 0.2, then, 0.4, label="accepted before", color=PALETTE[5])
    axes.bar(places + 0.2, now, 0.4, label="now", color=PALETTE[0])
    axes.legend(frameon=False)
    widest = np.argsort(parts)[::-1][:5]
    rows = [[int(place) + 1, float(then[place]), float(now[place]), float(parts[place])] for place in widest]
    return [
        Note(f"{len(data.items):,} events now, {before['events']:,} before."),
        Plot(f"How the items' shares moved: stability index {parts.sum():.3f}", figure),
        Table("The bins that moved most", ("bin", "share before", "share now", "part of the index"), rows),
    ]
