"""DuckDB as `ingest` uses it: bounded memory, the rest on disk beside the output, progress, errors that name rows."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from slipway.errors import ParamsError
from slipway.progress import Progress
from slipway.workloads.ranker.sources import Table, explain

BATCH_ROWS = 100_000


class Database:
    """A connection whose statements show their progress, in steps."""

    def __init__(self, connection: Any, progress: Progress) -> None:
        self.connection, self._progress = connection, progress

    def run(self, step: str, statement: str) -> None:
        """Run one statement, showing how far it is; an interrupt ends it."""
        with ThreadPoolExecutor(1) as pool:
            running, shown = pool.submit(self.connection.execute, statement), 0.0
            try:
                while wait([running], timeout=0.2).not_done:
                    done = max(shown, self.connection.query_progress() / 100)
                    self._progress.advance(done - shown, step=step)
                    shown = done
            except BaseException:
                self.connection.interrupt()
                raise
            running.result()
        self._progress.advance(1 - shown, step=step)

    def one(self, query: str) -> tuple[Any, ...]:
        """Give the single row of a query."""
        row: tuple[Any, ...] = self.connection.execute(query).fetchone()
        return row

    def batches(self, step: str, query: str, rows: int) -> Iterator[Any]:
        """Yield the rows of a query, `rows` in all, as Arrow batches, so that they are never all in memory."""
        for batch in self.connection.sql(query).to_arrow_reader(BATCH_ROWS):
            yield batch
            self._progress.advance(len(batch) / rows, step=step)


@contextmanager
def connect(work: Path, memory_mb: int, table: Table) -> Iterator[Database]:
    """Open a database in the folder `work`, which holds what does not fit into memory.

    Raises:
        DataError: a row of `table` is broken.  ParamsError: the memory does not suffice.  OSError: the disk is full.
    """
    import duckdb

    config = {
        "memory_limit": f"{memory_mb}MB",
        "temp_directory": str(work / "spill"),
        "autoinstall_known_extensions": "false",  # nothing is fetched from elsewhere
        "autoload_known_extensions": "false",
    }
    try:
        with (
            closing(duckdb.connect(":memory:", config=config)) as connection,
            Progress("ingest", None, "steps") as progress,
        ):
            connection.execute("SET TimeZone = 'UTC'")
            yield Database(connection, progress)
    except duckdb.Error as error:
        raise _ours(error, table, work, memory_mb) from error


def _ours(error: Exception, table: Table, work: Path, memory_mb: int) -> Exception:
    text = str(error)
    if "No space left" in text or "max_temp_directory_size" in text:
        return OSError(errno.ENOSPC, "no space left", str(work.parent.parent))
    if type(error).__name__ == "OutOfMemoryException":
        return ParamsError(f"params.yaml: ingest.memory_mb: {memory_mb} MB do not suffice for {table.name}; raise it")
    return explain(table, error)
