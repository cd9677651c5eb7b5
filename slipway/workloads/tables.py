"""A Parquet table that is written while its rows come, some thousand at a time: memory does not grow with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROWS = 8192  # that are held at once


class Rows:
    """The rows of a table, appended one by one.

    Args:
        path: of the table.
        columns: pyarrow's type of each column, by name.
    """

    def __init__(self, path: Path, columns: Mapping[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        self._schema = pa.schema(columns)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> Self:
        return self

    def write(self, row: tuple[Any, ...]) -> None:
        """Append a row: a value for each column, in order."""
        self._rows.append(row)
        if len(self._rows) >= ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = [pa.array(*each) for each in zip(zip(*self._rows, strict=True), self._schema.types, strict=True)]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        """Write what is held, and end the file."""
        if self._rows:
            self._flush()
        self._writer.close()

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()
