"""How fast and in how much memory `ingest` reads ten million rows, beside a peer that holds the table in memory.

    python -m benchmarks.ingest [--rows 10000000] [--memory-mb 512]

Writes benchmarks/results/ingest.json. Both sides read the same file in the same run, each in a process of its own, and
do the same work: leave out nulls and repetitions, filter, number, sort, and save the columns. The peer is pandas.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from slipway import artifacts

RESULT = Path("benchmarks/results/ingest.json")


def main() -> None:
    """Make the tables, run both sides, print a table and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--memory-mb", type=int, default=512)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(
            json.dumps(
                _slipway(options.source, options.memory_mb) if options.side == "slipway" else _pandas(options.source)
            )
        )
        return
    print(f"{options.rows:,} rows, ingest.memory_mb {options.memory_mb}")
    print(f"{'source':8} {'side':8} {'s':>7} {'rows/s':>11} {'peak MB':>8}")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in _tables(Path(folder), options.rows):
            for side in ("slipway", "pandas"):
                one = {"source": source.suffix[1:], "side": side, **_measure(side, source, options)}
                results.append(one)
                figures = f"{one['seconds']:7.1f} {one['rows_per_s']:11,.0f} {one['peak_mb']:8,.0f}"
                print(f"{one['source']:8} {side:8} {figures}", flush=True)
                artifacts.write_json(RESULT, {"rows": options.rows, "memory_mb": options.memory_mb, "results": results})


def _tables(folder: Path, rows: int) -> list[Path]:
    """Events of rows/20 users and 20,000 items with a long tail, in no order, as CSV and Parquet."""
    import duckdb

    query = f"""SELECT hash(i) % {max(rows // 20, 10)} AS user, 1600000000 + hash(i * 13) % 100000000 AS time,
        CAST(floor(20000 * pow((hash(i * 7) % 1000003) / 1000003, 3)) AS INT) AS item FROM range({rows}) AS t(i)"""
    paths = [folder / "events.csv", folder / "events.parquet"]
    for path in paths:
        duckdb.execute(f"COPY ({query}) TO '{path}'")
    return paths


def _measure(side: str, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.ingest", "--side", side, "--source", str(source)]
    done = subprocess.run([*command, "--memory-mb", str(options.memory_mb)], stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return {**figures, "rows_per_s": round(options.rows / figures["seconds"])}


def _figures(began: float, events: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(time.monotonic() - began, 2), "peak_mb": round(peak), "events": events}


def _slipway(source: Path, memory_mb: int) -> dict[str, Any]:
    from slipway import config
    from slipway.workloads.ranker.ingest import ingest

    columns = {"user": "user", "item": "item", "time": "time"}
    params = config.parse({"ingest": {"source": str(source), "columns": columns, "memory_mb": memory_mb}})
    report: dict[str, Any] = {}
    began = time.monotonic()
    with artifacts.writing(source.parent / "out") as folder:
        ingest(params, folder, report)
    return _figures(began, report["events"])


def _pandas(source: Path) -> dict[str, Any]:
    import numpy as np
    import pandas as pd

    began = time.monotonic()
    text = {"user": "string", "item": "string"}
    table = pd.read_csv(source, dtype=text) if source.suffix == ".csv" else pd.read_parquet(source).astype(text)
    table = table.dropna().drop_duplicates(["user", "item", "time"])
    while True:  # items: 1 event or more, so that the users' filter alone can bite
        few = table.groupby("user")["item"].transform("size") < 3
        if not few.any():
            break
        table = table[~few]
    counts = table["item"].value_counts()
    table["id"] = table["item"].map(pd.Series(np.arange(1, len(counts) + 1, dtype=np.int32), counts.index))
    table = table.sort_values(["user", "time"], kind="stable")
    np.save(source.parent / "items.npy", table["id"].to_numpy(np.int32))
    np.save(source.parent / "times.npy", table["time"].to_numpy(np.int64))
    sizes = table.groupby("user").size().to_numpy()
    np.save(source.parent / "offsets.npy", np.concatenate([[0], np.cumsum(sizes)]))
    return _figures(began, len(table))


if __name__ == "__main__":
    main()
