"""Where events come from: a CSV, TSV, Parquet or text table, here or behind a URL, as one SQL query over its rows.

A folder is one table of all the Parquet files under it, in the order of their names. The log of users' events is such a
folder; what its journals hold is turned to Parquet before it is read, so that every event that was accepted is there,
and what is read is a snapshot, which neither later events nor removed users change.

What cannot be a table is refused before it is read at length: a missing, empty, truncated or binary file, a wrong
delimiter, a missing column. A remote source is first copied beside the output, because it is read more than once, and
a broken connection is better met at the start.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from slipway import eventlog
from slipway.errors import DataError, SlipwayError
from slipway.params import Columns, IngestParams
from slipway.workloads import remote

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".dat": "text",
}
DELIMITERS = {"csv": ",;|", "tsv": "\t", "text": " "}
"""What may part the columns of each form; of several that which fits the first lines."""
SPOKEN = {"csv": "commas, semicolons or bars", "tsv": "tabs", "text": "blanks"}
HEAD = 1 << 16
"""Bytes of a file that are looked at before it is read."""


def _literal(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


@dataclass(frozen=True)
class Table:
    """A source that looks like a table, with the columns that were asked for."""

    name: str
    """The source as the user wrote it."""
    path: Path
    """The file, or the folder of Parquet files."""
    format: str
    header: bool
    width: int
    """Number of columns."""
    user: int
    item: int
    time: int | None
    delimiter: str = ""
    """What parts the columns of a table of text."""

    def scan(self) -> str:
        """Give a query for `row` (from 1; a header counts), and `user`, `item` and `time` as text."""
        path = _literal(self.path)
        row = f"row_number() OVER () + {int(self.header)}"
        if self.format == "parquet":
            files = ", ".join(_literal(file) for file in (_files(self.path) if self.path.is_dir() else [self.path]))
            field, source = "CAST(#{} AS VARCHAR)", f"read_parquet([{files}])"
        elif self.format == "text":
            field, source = "parts[{}]", self._lines(path, row)
            row = "row"
        else:
            names = ", ".join(f"'c{column}': 'VARCHAR'" for column in range(1, self.width + 1))
            field = "c{}"
            source = f"""read_csv({path}, auto_detect = false, header = {self.header}, strict_mode = true,
                delim = '{self.delimiter}', quote = '"', escape = '"', columns = {{{names}}})"""
        user, item = (_no_blank(field.format(column + 1)) for column in (self.user, self.item))
        time = "CAST(NULL AS VARCHAR)" if self.time is None else _no_blank(field.format(self.time + 1))
        return f"SELECT {row} AS row, {user} AS user, {item} AS item, {time} AS time FROM {source}"

    def _lines(self, path: str, row: str) -> str:
        """Read whole lines and cut them at runs of blanks, which no delimiter can say; empty lines are passed over."""
        return rf"""(SELECT row, CASE WHEN len(parts) = {self.width} THEN parts
                ELSE error(printf('row %d holds %d fields, not {self.width}', row, len(parts))) END AS parts FROM
                (SELECT {row} AS row, string_split_regex(trim(line, E' \t\r'), '[ \t]+') AS parts FROM
                    read_csv({path}, auto_detect = false, header = {self.header}, delim = E'\x01', quote = '',
                        escape = '', columns = {{'line': 'VARCHAR'}})) WHERE parts IS NOT NULL AND parts <> [''])"""


def _no_blank(field: str) -> str:
    return f"CASE WHEN trim({field}) IN ('', 'NaN') THEN NULL ELSE {field} END"


def open_table(ingest: IngestParams, work: Path) -> Table:
    """Find the source, copy it into `work` if it is remote, and look at its beginning.

    Raises:
        DataError: it is missing, empty, truncated or binary, is parted otherwise, or lacks a column.
        TransientError: its server did not answer.
    """
    name, form = ingest.source, ingest.format
    if "://" not in name and Path(name).is_dir():
        return _look_folder(name, Path(name), ingest.columns, work)
    if form == "auto":
        plain = name.removesuffix(".gz").removesuffix(".zst")
        form = ENDINGS.get(Path(plain).suffix.lower(), "")  # type: ignore[assignment]  # checked in the next line
        if not form:
            raise DataError(
                f"{name}: no telling its form by its ending; set ingest.format to csv, tsv, parquet or text"
            )
    path = Path(name)
    if "://" in name:
        path = remote.copy(name, work / ("source" + "".join(Path(name.split("?")[0]).suffixes[-2:])))
    if not path.exists():
        raise DataError(f"{name}: no such file; set ingest.source")
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty")
    return _look_parquet(name, path, ingest.columns) if form == "parquet" else _look(name, path, form, ingest.columns)


def _look_folder(name: str, folder: Path, columns: Columns, work: Path) -> Table:
    """Look at every file of a folder: nothing in it is passed over."""
    if eventlog.is_log(folder):
        folder = eventlog.snapshot(folder, work / "log")
    tables = []
    for path in _files(folder):
        own = f"{name}/{path.relative_to(folder)}"
        if ENDINGS.get(path.suffix.lower()) != "parquet":
            raise DataError(
                f"{own}: no Parquet file; a folder must hold nothing else; or set ingest.source to one file"
            )
        tables.append(_look_parquet(own, path, columns))
    if not tables:
        raise DataError(f"{name}: a folder without Parquet files; set ingest.source")
    first = tables[0]
    for table in tables:
        if (table.user, table.item, table.time, table.width) != (first.user, first.item, first.time, first.width):
            raise DataError(f"{table.name}: has other columns than {first.name}; the files of a folder must be alike")
    return Table(name, folder, "parquet", False, first.width, first.user, first.item, first.time)


def _files(folder: Path) -> list[Path]:
    """Files under a folder, but for hidden ones."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _look_parquet(name: str, path: Path, columns: Columns) -> Table:
    import pyarrow.parquet

    with path.open("rb") as stream:
        first = stream.read(4)
        stream.seek(max(-4, -path.stat().st_size), 2)
        last = stream.read(4)
    if first != b"PAR1":
        raise DataError(f"{name}: not a Parquet file (it does not begin with PAR1); set ingest.format")
    if last != b"PAR1":
        raise DataError(f"{name}: a truncated Parquet file (it does not end with PAR1); fetch it again")
    try:
        names = pyarrow.parquet.read_schema(path).names
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: a damaged Parquet file ({error}); fetch it again") from error
    user, item, time = _find(name, names, columns, header=True)
    return Table(name, path, "parquet", False, len(names), user, item, time)


def _look(name: str, path: Path, form: str, columns: Columns) -> Table:
    """Look at the first lines of a table of text: is it text, how is it parted, which columns has it."""
    lines = _first_lines(name, path)
    header = any(isinstance(column, str) for column in (columns.user, columns.item, columns.time))
    delimiter = _delimiter(form, lines)
    if delimiter is None:
        raise DataError(_misparted(name, form, lines))
    names = _cut(lines[0], delimiter)
    if header and len(lines) == 1:
        raise DataError(f"{name}: there are no rows under the header")
    user, item, time = _find(name, names, columns, header)
    return Table(name, path, form, header, len(names), user, item, time, delimiter)


def _delimiter(form: str, lines: list[str]) -> str | None:
    """The delimiter that parts the first lines alike and into most columns; or else one that parts the first line."""
    widths = {each: [len(_cut(line, each)) for line in lines[:20]] for each in DELIMITERS[form]}
    parting = {each: found for each, found in widths.items() if found[0] > 1}
    alike = [each for each, found in parting.items() if len(set(found)) == 1]
    return max(alike, key=lambda each: widths[each][0]) if alike else next(iter(parting), None)


def _cut(line: str, delimiter: str) -> list[str]:
    return line.split() if delimiter == " " else next(csv.reader([line], delimiter=delimiter))


def _first_lines(name: str, path: Path) -> list[str]:
    import fsspec

    try:
        with fsspec.open(str(path.resolve()), "rb", compression="infer") as stream:
            head = stream.read(HEAD)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
    if b"\0" in head:
        raise DataError(f"{name}: a binary file, not a table of text; set ingest.format, or give another source")
    try:
        text = head.decode("utf-8-sig") if len(head) < HEAD else head.decode("utf-8-sig", "ignore")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (byte {error.start}); convert it, as with iconv") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{name}: the file holds nothing but blanks")
    return lines


def _misparted(name: str, form: str, lines: list[str]) -> str:
    """Say which form would part the first lines alike."""
    found = f"{name}: one column only when parted by {SPOKEN[form]}"
    for other, delimiters in DELIMITERS.items():
        counts = [{line.count(delimiter) for line in lines[:20]} for delimiter in delimiters]
        if other != form and any(len(count) == 1 and count != {0} for count in counts):
            return f"{found}; {SPOKEN[other]} seem right: set ingest.format to {other}"
    return f"{found}; a user and an item are needed in every row"


def _find(name: str, names: list[str], columns: Columns, header: bool) -> tuple[int, int, int | None]:
    """Positions of the three columns."""

    def position(key: str, wanted: str | int) -> int:
        if isinstance(wanted, str) and wanted in names:
            return names.index(wanted)
        if isinstance(wanted, int) and 0 <= wanted < len(names):
            return wanted
        there = ", ".join(names) if header else f"positions 0 to {len(names) - 1}"
        raise DataError(f"{name}: no column {wanted!r}; there are: {there}; set ingest.columns.{key}")

    user, item = position("user", columns.user), position("item", columns.item)
    return user, item, None if columns.time is None else position("time", columns.time)


def explain(table: Table, error: Exception) -> SlipwayError:
    """Turn what DuckDB says of a bad row into one line that names the source and the row."""
    text = str(error)
    line = re.search(r"Line: (\d+)", text)
    fields = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    if line and fields:
        return DataError(f"{table.name}: row {line[1]} holds {fields[2]} fields, not {fields[1]}")
    if line:
        what = next((w for w in ("not utf-8", "unterminated quote") if w in text), text.splitlines()[0])
        return DataError(f"{table.name}: row {line[1]}: {what}; mend the row or leave it out")
    if "invalid state" in text and (odd := _odd_end(table.path)):
        return DataError(f"{table.name}: row {odd} ends otherwise than those before, of CRLF and LF; give all one end")
    return DataError(f"{table.name}: {text.removeprefix('Invalid Input Error: ').splitlines()[0]}")


def _odd_end(path: Path) -> int | None:
    """The first row of a file of text whose line ends otherwise, of CRLF and LF, than those before it."""
    import fsspec

    with fsspec.open(str(path.resolve()), "rb", compression="infer") as stream:
        ends = (line.endswith(b"\r\n") for line in stream if line.endswith(b"\n"))
        first = next(ends, None)
        return next((row for row, end in enumerate(ends, 2) if end != first), None)
