"""Ingested folders made from lists, for tests that start behind `ingest`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.serving import packages


def write(folder: Path, users: Sequence[Sequence[int]], items: int | None = None) -> Path:
    """Write the columns of `slipway.workloads.ranker.sequences`; item i has `packages.key(i)`, user u `user-u`."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = np.array([item for user in users for item in user], dtype=np.int32)
    count = items or int(flat.max())
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, users)]).astype(np.int64))
    np.save(folder / "items.npy", flat)
    events = np.bincount(flat, minlength=count + 1)[1:]
    pq.write_table(pa.table({"key": [f"user-{u}" for u in range(len(users))]}), folder / "users.parquet")
    pq.write_table(
        pa.table({"key": [packages.key(i) for i in range(1, count + 1)], "events": events}), folder / "items.parquet"
    )
    meta = {"source": "lists", "events": len(flat), "users": len(users), "items": count}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def steps(users: int, items: int, seed: int = 0, shortest: int = 5, longest: int = 14) -> list[list[int]]:
    """Users whose next item is mostly the one after, modulo the number of items: a rule that a model can learn."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(users):
        length = int(rng.integers(shortest, longest + 1))
        first = int(rng.integers(items))
        made.append([(first + i) % items + 1 for i in range(length)])
    return made
