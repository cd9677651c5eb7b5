"""Turn a table of events into the columns of sequences.py, in bounded memory however long the table is.

DuckDB reads, filters and sorts, on disk where `ingest.memory_mb` does not suffice; the result is streamed to files.

- Ids are keys: any text or number, kept as the source wrote it. An empty field is a null.
- A time is a number, kept as it is (or as microseconds where some are fractions of a second), or an ISO date or
  timestamp, kept as microseconds since 1970 in UTC. The first one tells which; another kind is an error.
- Rows with a null, and rows that repeat an earlier user, item and time, are left out of the sequences and counted.
  Without a time a repetition is an event like any other, because its place is its time.
- Users and items with too few events are left out again and again until all that are left have enough.
- Events of a user are sorted by time, ties by their order in the source.

Besides the columns, `rejects.parquet` holds the rows left out for what they are (row, reason, user, item, time; the
first 1000 a reason), and `meta.json` how many there are.
"""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slipway import artifacts
from slipway.errors import DataError
from slipway.params import Params
from slipway.workloads.ranker import imports
from slipway.workloads.ranker.database import Database, connect
from slipway.workloads.ranker.sources import Table, open_table

EMBEDDED = "embedded"
MAX_REJECTS = 1000
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


def ingest(params: Params, out: Path, report: MutableMapping[str, Any], least: int = 2) -> None:
    """Write the sequences of `params.ingest.source` into the folder `out`, which is made; figures go to `report`.

    At least `least` users and items have to be left after filtering.

    Raises:
        DataError: the source is no table of events, a row is broken, or too little is left of it.
    """
    work = out / ".work"
    work.mkdir(parents=True)
    try:
        table = _embedded(params, work) if params.ingest.source == EMBEDDED else open_table(params.ingest, work)
        with connect(work, params.ingest.memory_mb, table) as database:
            meta = {"source": table.name, **_sequences(database, table, params, out, least)}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    artifacts.write_json(out / "meta.json", meta)
    for key, value in meta.items():
        report[key] = value
    report["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def held_out(params: Params, package: Path, out: Path, report: MutableMapping[str, Any]) -> None:
    """Ingest a source that a model from elsewhere is scored on: no item is left out for being rare.

    Users need `min_user_events`, as a history without a truth tells nothing.
    """
    whole = params.ingest.model_copy(update={"min_item_events": 1})
    ingest(params.model_copy(update={"ingest": whole}), out, report)


def _embedded(params: Params, work: Path) -> Table:
    path = work / "imports.parquet"
    imports.write(params.ingest.distributions, path)
    return Table(EMBEDDED, path, "parquet", header=False, width=2, user=0, item=1, time=None)


def _sequences(database: Database, table: Table, params: Params, out: Path, least: int) -> dict[str, Any]:
    rows, time_unit = _read(database, table)
    dropped = _reject(database, table, out / "rejects.parquet")
    _keep(database, params.ingest.min_user_events, params.ingest.min_item_events)
    counts = _number(database, table, params, least)
    dropped["few_events"] = rows - sum(dropped.values()) - counts["events"]
    _export(database, out, counts, timed=table.time is not None)
    return {"rows": rows, **counts, "dropped": dropped, "time_unit": time_unit}


def _read(database: Database, table: Table) -> tuple[int, str | None]:
    """Read the source into the table `raw` (row, user, item, time); give the number of rows and the unit of time."""
    scan = table.scan()
    first = database.connection.execute(f"SELECT time FROM ({scan}) WHERE time IS NOT NULL LIMIT 1").fetchone()
    number = first is not None and re.fullmatch(NUMBER, first[0].strip()) is not None
    parsed = "TRY_CAST(time AS BIGINT)" if number else "epoch_us(TRY_CAST(time AS TIMESTAMPTZ))"
    rest = f"coalesce(TRY_CAST(time AS DOUBLE) - {parsed}, 0)" if number else "0.0"
    kind = "a number" if number else "an ISO date or timestamp"
    database.run(
        "read",
        f"""CREATE TABLE raw AS SELECT row, user, item, {rest} AS rest, CASE WHEN time IS NOT NULL AND {parsed} IS NULL
            THEN error(printf('row %d: time %s is not {kind}; mend the row or leave it out', row, time))
            ELSE {parsed} END AS time FROM ({scan})""",
    )
    rows, fractions = database.one("SELECT count(*), count(*) FILTER (rest <> 0 AND abs(time) < 1e12) FROM raw")
    if not rows:
        raise DataError(f"{table.name}: there are no rows")
    if fractions:
        database.run("scale times", "UPDATE raw SET time = time * 1000000 + CAST(round(rest * 1e6) AS BIGINT)")
    return rows, None if table.time is None else ("us" if fractions or not number else "as given")


def _reject(database: Database, table: Table, path: Path) -> dict[str, int]:
    """Make the table `events` (row, u, i, time) of the rows without a null or a repetition; write down the others."""
    timed = table.time is not None
    null = "user IS NULL OR item IS NULL" + (" OR time IS NULL" if timed else "")
    for key, letter in (("user", "u"), ("item", "i")):
        database.run(
            f"number {key}s",
            f"""CREATE TABLE {key}_keys AS SELECT key, CAST(row_number() OVER (ORDER BY key) AS INTEGER) AS {letter}
                FROM (SELECT DISTINCT {key} AS key FROM raw WHERE NOT ({null}))""",
        )
    database.run(
        "number events",
        f"""CREATE TABLE events AS SELECT row, u, i, time FROM raw JOIN user_keys ON user = user_keys.key
            JOIN item_keys ON item = item_keys.key WHERE NOT ({null})""",
    )
    database.run(
        "find repetitions",
        f"""CREATE TABLE again AS SELECT row FROM events JOIN
            (SELECT u, i, time, min(row) AS first FROM events WHERE {timed} GROUP BY ALL HAVING count(*) > 1)
            USING (u, i, time) WHERE row > first""",
    )
    nulls, repetitions = database.one(f"SELECT count(*) FILTER ({null}), (SELECT count(*) FROM again) FROM raw")
    database.run(
        "write rejects",
        f"""COPY (
            (SELECT row, 'null' AS reason, user, item, CAST(time AS VARCHAR) AS time FROM raw WHERE {null}
                ORDER BY row LIMIT {MAX_REJECTS})
            UNION ALL (SELECT row, 'duplicate', user, item, CAST(time AS VARCHAR) FROM raw SEMI JOIN again USING (row)
                ORDER BY row LIMIT {MAX_REJECTS}) ORDER BY 1) TO '{_quoted(path)}' (FORMAT parquet)""",
    )
    database.run("forget the rest", "DROP TABLE raw")
    if repetitions:
        database.run("drop repetitions", "DELETE FROM events WHERE row IN (SELECT row FROM again)")
    return {"null": nulls, "duplicate": repetitions}


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _keep(database: Database, min_user_events: int, min_item_events: int) -> None:
    """Make the tables `kept_u` and `kept_i` of those who have enough events among one another."""
    database.run("filter", "CREATE TABLE kept_u AS SELECT u FROM user_keys")
    before = None
    while True:
        for own, other, least in (("i", "u", min_item_events), ("u", "i", min_user_events)):
            database.run(
                "filter",
                f"""CREATE OR REPLACE TABLE kept_{own} AS
                    SELECT {own} FROM events SEMI JOIN kept_{other} USING ({other})
                    GROUP BY {own} HAVING count(*) >= {least}""",
            )
        now = database.one("SELECT (SELECT count(*) FROM kept_u), (SELECT count(*) FROM kept_i)")
        if now == before:
            return
        before = now


def _number(database: Database, table: Table, params: Params, least: int) -> dict[str, Any]:
    """Give kept users (by key) and items (by events, then key) their ids; count them and their events."""
    database.run(
        "order items",
        """CREATE TABLE items AS SELECT i, key, n, CAST(row_number() OVER (ORDER BY n DESC, key) AS INTEGER) AS id FROM
            (SELECT i, count(*) AS n FROM events SEMI JOIN kept_u USING (u) SEMI JOIN kept_i USING (i) GROUP BY i)
            JOIN item_keys USING (i)""",
    )
    users, items, events = database.one(
        "SELECT (SELECT count(*) FROM kept_u), (SELECT count(*) FROM items), (SELECT coalesce(sum(n), 0) FROM items)"
    )
    for count, what in ((users, "user"), (items, "item")):
        if count < least:
            limits = f"min_user_events {params.ingest.min_user_events}, min_item_events {params.ingest.min_item_events}"
            raise DataError(
                f"{table.name}: {count or 'no'} {what} left after filtering (ingest: {limits}), "
                f"at least {least} are needed"
            )
    return {"events": int(events), "users": users, "items": items}


def _export(database: Database, out: Path, counts: dict[str, Any], timed: bool) -> None:
    """Stream the columns to their files."""
    kept_users = "user_keys SEMI JOIN kept_u USING (u)"
    database.run("write users", f"COPY (SELECT key FROM {kept_users} ORDER BY u) TO '{_quoted(out / 'users.parquet')}'")
    database.run(
        "write items", f"COPY (SELECT key, n AS events FROM items ORDER BY id) TO '{_quoted(out / 'items.parquet')}'"
    )
    database.run(
        "sort",
        """CREATE TABLE sorted AS SELECT u, id, time FROM events SEMI JOIN kept_u USING (u) JOIN items USING (i)
            ORDER BY u, time, row""",
    )
    columns = {"items.npy": ("id", np.int32)} | ({"times.npy": ("time", np.int64)} if timed else {})
    with _columns(out, {name: (kind, counts["events"]) for name, (_, kind) in columns.items()}) as files:
        for batch in database.batches("write", "SELECT id, time FROM sorted", counts["events"]):
            for name, (column, kind) in columns.items():
                files[name].write(batch.column(column).to_numpy(zero_copy_only=False).astype(kind).tobytes())
    end, lengths = 0, "SELECT CAST(count(*) AS BIGINT) AS n FROM sorted GROUP BY u ORDER BY u"
    with _columns(out, {"offsets.npy": (np.int64, counts["users"] + 1)}) as files:
        files["offsets.npy"].write(np.zeros(1, np.int64).tobytes())
        for batch in database.batches("write", lengths, counts["users"]):
            ends = end + np.cumsum(batch.column("n").to_numpy(zero_copy_only=False), dtype=np.int64)
            files["offsets.npy"].write(ends.tobytes())
            end = int(ends[-1])


@contextmanager
def _columns(out: Path, columns: dict[str, tuple[Any, int]]) -> Iterator[dict[str, Any]]:
    """Open .npy files of known type and length for writing in order.

    Not mapped into memory: a full disk would end the process by a signal instead of an error.
    """
    files = {name: (out / name).open("wb") for name in columns}
    try:
        for name, (kind, length) in columns.items():
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(files[name], header)
        yield files
    finally:
        for file in files.values():
            file.close()
