"""The log of what users did: journals that replicas append to, and the Parquet files of the next release's data.

    FOLDER/events-ID.parquet    user, item (text), time (UTC), id (text), at: when it arrived (UTC); each event once;
                                some `FILE_BYTES` long, but for the one that is growing
    FOLDER/journals/ID.open     lines [user, item, time, id, at], written by one replica
    FOLDER/journals/ID.closed   the same, which nobody writes any more
    FOLDER/forgotten/HASH       a user who was removed, by SHA-256, and when; `.pending` until it is done

An event is durable against the death of its process when `Journal.write` returns, against a power cut a second later
(`Journal.sync`, which its owner calls that often).

One rule keeps journals whole: who writes one or closes it holds its lock (flock, which the kernel lets go when the
holder dies), and a writer makes sure that its file still bears its name. So anybody may close any journal, of a living
replica or of a dead one, by a rename; none is ever an orphan. `sweep` adds the closed ones to the Parquet file that
grows, beside and then by rename, and removes the journals last: killed at any step, the next one goes on, and an event
is in the Parquet files exactly once. An event's id is accepted once a user within `WINDOW_S`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from slipway import artifacts

SEGMENT_BYTES = 16 * 2**20
"""A journal that is so long is closed by its writer; so much, and one journal more, a sweep has in memory at once."""
FILE_BYTES = 8 * 2**20
"""A Parquet file that is so long is full. Such a one holds half a million events; to add a journal takes 0.4 s."""
WINDOW_S = 86_400
"""For so long an id is not accepted twice, and earlier events of a removed user are refused when they come."""
GRACE_S = 10.0
"""A living replica closes its own journal in time; one that is so much older belongs to a dead one."""

OPEN, CLOSED, PENDING = ".open", ".closed", ".pending"


class Event(NamedTuple):
    """One event; times are µs since 1970, UTC."""

    user: str
    item: str
    time: int
    """When it happened."""
    id: str
    """Names it among the user's events."""
    at: int
    """When it arrived."""


class Swept(NamedTuple):
    """What one sweep did."""

    events: int
    """New in the Parquet files."""
    removed: int
    """Of users who were removed."""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


class Journal:
    """The journal of one replica; no file is there before its first event.

    Args:
        folder: of the log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = journals(folder)
        self._file: int | None = None
        self._path = Path()
        self._size, self._began, self._synced = 0, 0.0, True

    def write(self, events: Sequence[Event]) -> None:
        """Append events by one write; all of them are in the journal, or none.

        Raises:
            OSError: the disk is full or broken.
        """
        data = b"".join([_encode(event) + b"\n" for event in events])
        if self._file is None or not self._hold():
            self._begin()
        assert self._file is not None
        try:
            self._append(data)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        if self._size >= SEGMENT_BYTES:
            self.close()

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        try:
            written = os.write(self._file, data)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        if written < len(data):  # a full disk takes a part
            os.ftruncate(self._file, self._size)
            raise OSError(f"{self._path}: only {written} of {len(data)} bytes could be written")
        self._size += written
        self._synced = False

    def _hold(self) -> bool:
        """Lock the file; False if somebody closed it, or is about to."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path.stat()  # its name is used once: if there is a file, it is this one
        except (BlockingIOError, FileNotFoundError):
            return False
        return True

    def _begin(self) -> None:
        self._release()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = self._folder / f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(4).hex()}{OPEN}"
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size, self._began = 0, time.monotonic()
        if not self._hold():  # closed in this very moment
            self._begin()

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Let the next sweep have what was written; more can be written, to a new file."""
        if self._file is not None:
            self.sync()
            _close(self._path)
            self._release()

    def close_if_older(self, seconds: float) -> None:
        """Close it if its first event is older than that."""
        if self._file is not None and time.monotonic() - self._began >= seconds:
            self.close()

    def sync(self) -> None:
        """Make sure that what was written outlives a power cut."""
        if self._file is not None and not self._synced:
            os.fdatasync(self._file)
            self._synced = True


def journals(folder: Path) -> Path:
    """Where the journals of a log are."""
    return folder / "journals"


def forgotten(folder: Path) -> Path:
    """Where the marks of removed users are."""
    return folder / "forgotten"


def is_log(folder: Path) -> bool:
    """Whether a folder is such a log."""
    return journals(folder).is_dir()


def due(folder: Path, age_s: float) -> bool:
    """Whether a sweep would find work: a closed journal, a dead replica's, or a user to be removed."""
    return any(journals(folder).glob(f"*{CLOSED}")) or any(_dead(folder, age_s)) or any(_pending(folder))


def _dead(folder: Path, age_s: float) -> Iterator[Path]:
    limit = time.time_ns() - int((age_s + GRACE_S) * 1e9)
    return (path for path in journals(folder).glob(f"*{OPEN}") if int(path.name.split("-")[0]) < limit)


def _pending(folder: Path) -> Iterator[Path]:
    return forgotten(folder).glob(f"*{PENDING}")


def sweep(
    folder: Path, age_s: float = -GRACE_S, step: Callable[[str], None] = lambda _: None, full: int = FILE_BYTES
) -> Swept:
    """Move closed journals, and open ones of dead replicas (older than `age_s`; any by default), into Parquet files.

    One at a time: a second caller waits. `step` is told of every step before it is done; a file of `full` bytes or more
    grows no further.

    Raises:
        OSError: the disk is full or broken; nothing is lost, call it again.
    """
    with _alone(folder):
        return _sweep(folder, age_s, step, full)


def snapshot(folder: Path, into: Path) -> Path:
    """Sweep, then give `into`, a new folder, all files of the log but its journals and marks, as they are now.

    A file of the log is never written again, only replaced: links to them suffice, on the same file system.

    Raises:
        OSError: the disk is full or broken.
    """
    own = {journals(folder), forgotten(folder)}
    with _alone(folder):
        _sweep(folder, -GRACE_S, lambda _: None, FILE_BYTES)
        for path in folder.rglob("*"):
            if path.is_file() and path.parent not in own:
                target = into / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, target)
                except OSError:  # another file system, or one without links; what else is wrong ends the copy, too
                    shutil.copyfile(path, target)
    return into


def forget(folder: Path, user: str, step: Callable[[str], None] = lambda _: None) -> Swept:
    """Remove a user from every file of the log; what of him is still under way is refused when it comes.

    Idempotent. Killed half-way, the next sweep goes on. Whoever has the folder's Parquet files open keeps what he read.
    """
    with _alone(folder):
        step("mark")
        mark = forgotten(folder) / f"{_hash(user)}{PENDING}"
        artifacts.write_json(mark, {"at": time.time_ns() // 1000})
        return _sweep(folder, -GRACE_S, step, FILE_BYTES)


def tell(events: Sequence[Event]) -> list[Event]:
    """Leave out what repeats an earlier id of its user."""
    return list({(event.user, event.id): event for event in reversed(events)}.values())[::-1]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    journals(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path, age_s: float, step: Callable[[str], None], full: int) -> Swept:
    gone = _gone(folder)
    for path in sorted(_dead(folder, age_s)):
        step("close")
        _close(path)
    added = removed = 0
    for some in _together(sorted(journals(folder).glob(f"*{CLOSED}"))):
        events = [event for journal in some for event in _read(journal)]
        kept = [event for event in events if event.at > gone.get(_hash(event.user), -1)] if gone else events
        removed += len(events) - len(kept)
        kept = _unknown(folder, tell(kept))  # all are known if the last sweep was killed before its last steps
        added += len(kept)
        if kept:
            step("write")
            _add(_growing(folder, full) or folder / f"events-{some[0].stem}.parquet", kept)
        for journal in some:
            step("remove")
            journal.unlink()
    return Swept(added, removed + _remove_pending(folder, step))


def _together(closed: Sequence[Path]) -> Iterator[list[Path]]:
    """Part journals into lots of `SEGMENT_BYTES` or one journal more: for each lot a Parquet file is written anew."""
    lot: list[Path] = []
    size = 0
    for journal in closed:
        lot.append(journal)
        size += journal.stat().st_size
        if size >= SEGMENT_BYTES:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot


def _close(path: Path) -> None:
    """Rename a journal under its lock, so that no write of a living replica is under way."""
    with suppress(FileNotFoundError), path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        path.rename(path.with_suffix(CLOSED))


def _read(journal: Path) -> Iterator[Event]:
    *lines, _ = journal.read_bytes().split(b"\n")  # what no line ends was never acknowledged
    for line in lines:
        with suppress(msgspec.MsgspecError):
            yield _decode(line)


def _hash(user: str) -> str:
    return hashlib.sha256(user.encode()).hexdigest()


def _gone(folder: Path) -> dict[str, int]:
    """When users were removed, by their hash; a mark that is older than any event under way is dropped."""
    found: dict[str, int] = {}
    for mark in forgotten(folder).glob("[0-9a-f]*"):
        at = int(json.loads(mark.read_bytes())["at"])
        if mark.suffix != PENDING and at < (time.time() - WINDOW_S) * 1e6:
            mark.unlink()
        else:
            found[mark.stem] = max(at, found.get(mark.stem, 0))
    return found


def _unknown(folder: Path, events: list[Event]) -> list[Event]:
    """Leave out what is in a Parquet file of the last `WINDOW_S`."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not events:
        return events
    known: set[tuple[str, str]] = set()
    ids, limit = {event.id for event in events}, min(event.at for event in events) / 1e6 - WINDOW_S
    wanted = pc.field("id").isin(list(ids))
    for path in _files(folder):
        if path.stat().st_mtime >= limit:
            rows = pq.read_table(path, columns=["user", "id"], filters=wanted)
            known |= set(zip(rows["user"].to_pylist(), rows["id"].to_pylist(), strict=True))
    return [event for event in events if (event.user, event.id) not in known]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events-*.parquet"))


def _growing(folder: Path, full: int) -> Path | None:
    sizes = {path: path.stat().st_size for path in _files(folder)}
    # The largest: of many small ones, as removed users or earlier versions leave them, one fills at a time.
    return max((path for path, size in sizes.items() if size < full), key=sizes.__getitem__, default=None)


def _add(target: Path, events: list[Event]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    moment = pa.timestamp("us", "UTC")
    types = {"user": pa.string(), "item": pa.string(), "time": moment, "id": pa.string(), "at": moment}
    columns = zip(types.items(), zip(*events, strict=True), strict=True)
    table = pa.table({name: pa.array(values, kind) for (name, kind), values in columns})
    _replace(target, pa.concat_tables([pq.read_table(target), table]) if target.exists() else table)


def _replace(target: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    with artifacts.writing(target) as beside:
        pq.write_table(table, beside, compression="zstd")
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name outlives a power cut before the old file is removed
    finally:
        os.close(folder)


def _remove_pending(folder: Path, step: Callable[[str], None]) -> int:
    """Rewrite the Parquet files that hold users who were removed, then mark them as done."""
    marks = {path.stem: path for path in _pending(folder)}
    gone = _gone(folder)
    removed = 0
    for path in _files(folder) if marks else []:
        removed += _without(path, {name: gone[name] for name in marks}, step)
    for path in marks.values():
        step("done")
        path.rename(path.with_suffix(""))
    return removed


def _without(path: Path, gone: dict[str, int], step: Callable[[str], None]) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    users = pq.read_table(path, columns=["user"])["user"].unique().to_pylist()
    leaving = {user: gone[_hash(user)] for user in users if _hash(user) in gone}
    if not leaving:
        return 0
    table = pq.read_table(path)
    before = len(table)
    for user, at in leaving.items():
        his = pc.and_(pc.equal(table["user"], user), pc.less_equal(table["at"].cast(pa.int64()), at))
        table = table.filter(pc.invert(his))
    step("rewrite")
    if len(table):
        _replace(path, table)
    else:
        path.unlink()
    return before - len(table)


HELP = """Turn the journals of users' events into Parquet files, or remove a user from the whole log.

Replicas do both by themselves, by this command, so that they never load Parquet's library; where they have none, call
it from time to time. It may be killed at any moment, and run while replicas write. Prints what it did, as JSON: events
that are new in the Parquet files, and removed ones."""


def main(stdin: IO[str], arguments: Sequence[str]) -> None:
    """Sweep the log in a folder, or remove a user from it, as a process of its own."""
    parser = argparse.ArgumentParser(
        prog="python -m slipway.eventlog", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the log, such as .slipway/events")
    parser.add_argument(
        "age_s",
        type=float,
        nargs="?",
        help="sweep: take closed journals, and open ones that are older and whose replica died (s; serve.rotate_s)",
    )
    parser.epilog = "Without age_s the user is removed whose key stands on standard input, as JSON: echo '\"ann\"' | …"
    given = parser.parse_args(arguments)
    swept = forget(given.folder, json.load(stdin)) if given.age_s is None else sweep(given.folder, given.age_s)
    print(json.dumps(swept._asdict()))


if __name__ == "__main__":
    import sys

    main(sys.stdin, sys.argv[1:])
