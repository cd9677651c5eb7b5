"""The log of events: killed at any step it loses nothing, doubles nothing, and never brings a removed user back."""

from __future__ import annotations

import fcntl
import io
import json
import os
import resource
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway import eventlog
from slipway.eventlog import Event, Journal
from slipway.params import IngestParams
from slipway.workloads.ranker import sources
from tests.conftest import until

USERS = ("ann", "bob", "c/é")


class KilledError(BaseException):
    """Stands for SIGKILL: nothing but `finally` runs, and that only lets go of locks, as the kernel would."""


def event(user: str, number: int) -> Event:
    return Event(user, f"item{number}", 1_700_000_000_000_000 + number, f"id{number}", time.time_ns() // 1000)


def logged(folder: Path) -> list[tuple[str, str]]:
    rows = [row for path in files(folder) for row in pq.read_table(path).to_pylist()]
    return [(row["user"], row["id"]) for row in rows]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def swept(folder: Path) -> list[tuple[str, str]]:
    eventlog.sweep(folder)
    return logged(folder)


class Killer:
    """Raises at one step."""

    def __init__(self, at: int | None) -> None:
        self.left = at

    def __call__(self, _: str) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KilledError


WRITE = st.tuples(st.just("write"), st.integers(0, 1), st.lists(st.tuples(st.sampled_from(USERS), st.integers(0, 9))))
SWEEP = st.tuples(st.just("sweep"), st.none() | st.integers(0, 8), st.sampled_from([1, eventlog.FILE_BYTES]))
FORGET = st.tuples(st.just("forget"), st.sampled_from(USERS), st.none() | st.integers(0, 8))


@settings(max_examples=60)
@given(steps=st.lists(WRITE | SWEEP | FORGET, max_size=12))
def test_every_event_is_there_once_whatever_is_killed_when(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writers = [Journal(folder), Journal(folder)]
        expected: set[tuple[str, str]] = set()
        for kind, *rest in steps:
            try:
                if kind == "write":
                    number, given_events = rest
                    events = [event(user, n) for user, n in given_events]  # type: ignore[attr-defined]
                    if events:
                        writers[number].write(events)  # type: ignore[call-overload]
                    expected |= {(each.user, each.id) for each in events}
                elif kind == "sweep":
                    eventlog.sweep(folder, step=Killer(rest[0]), full=rest[1])  # type: ignore[arg-type]
                else:
                    user = str(rest[0])
                    expected = {pair for pair in expected if pair[0] != user}
                    eventlog.forget(folder, user, Killer(rest[1]))  # type: ignore[arg-type]
            except KilledError:
                if kind == "forget":  # nobody was told that it is done: it is asked for again
                    eventlog.forget(folder, str(rest[0]))
            found = logged(folder)
            assert len(found) == len(set(found))
        assert sorted(swept(folder)) == sorted(expected)
        assert not list(eventlog.journals(folder).iterdir())


def test_journals_are_added_to_one_file_until_it_is_full(tmp_path: Path) -> None:
    events = [event(os.urandom(16).hex(), number) for number in range(60)]
    for each in events:
        Journal(tmp_path).write([each])
        eventlog.sweep(tmp_path, full=2500)
    assert sorted(logged(tmp_path)) == sorted((each.user, each.id) for each in events)
    assert 1 < len(files(tmp_path)) < 10
    assert all(2500 <= path.stat().st_size < 3000 for path in files(tmp_path)[:-1])


def test_a_sweep_writes_one_file_however_many_journals_there_are_and_bounds_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, writes in ((eventlog.SEGMENT_BYTES, 1), (100, 3)):  # a line is 50 bytes and more: two journals a lot
        monkeypatch.setattr(eventlog, "SEGMENT_BYTES", limit)
        before, steps = len(logged(tmp_path)), list[str]()
        for number in range(before, before + 6):
            Journal(tmp_path).write([event("ann", number)])
        assert eventlog.sweep(tmp_path, step=steps.append).events == 6
        assert (steps.count("write"), steps.count("remove")) == (writes, 6)
    assert sorted(logged(tmp_path)) == [("ann", f"id{number}") for number in sorted(range(12), key=str)]


def test_of_many_small_files_one_grows(tmp_path: Path) -> None:
    for number in range(4):
        Journal(tmp_path).write([event(os.urandom(16).hex(), number)])
        eventlog.sweep(tmp_path, full=1)
    small = files(tmp_path)
    for number in range(4, 8):
        Journal(tmp_path).write([event(os.urandom(16).hex(), number)])
        eventlog.sweep(tmp_path)
    assert files(tmp_path) == small
    assert sorted(pq.read_metadata(path).num_rows for path in small) == [1, 1, 1, 5]


def test_ingest_has_each_event_once_whatever_is_written_and_removed_meanwhile(tmp_path: Path) -> None:
    folder, told, enough = tmp_path / "log", 0, threading.Event()

    def write() -> None:
        nonlocal told
        while not enough.is_set():
            Journal(folder).write([event(os.urandom(16).hex(), told), event("ann", -1 - told)])
            eventlog.sweep(folder, full=2500)
            told += 1
            if told % 5 == 0:
                eventlog.forget(folder, "ann")  # it rewrites all files

    def read(work: Path) -> None:
        least = told
        work.mkdir()
        scan = sources.open_table(IngestParams(source=str(folder)), work).scan()
        most = told + 1  # one may be written and not yet told
        until(lambda: told > most + 5)
        query = f"SELECT count(DISTINCT item), count(*) FROM ({scan}) WHERE user <> 'ann'"
        distinct, found = duckdb.sql(query).fetchall()[0]
        assert least <= distinct == found <= most

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(write)
        try:
            until(lambda: told)
            for number in range(12):
                read(tmp_path / str(number))
        finally:
            enough.set()
        writer.result()


def test_a_killed_removal_is_finished_by_the_next_sweep(tmp_path: Path) -> None:
    Journal(tmp_path).write([event("ann", 1), event("bob", 2)])
    assert len(swept(tmp_path)) == 2
    with pytest.raises(KilledError):
        eventlog.forget(tmp_path, "ann", Killer(1))
    assert eventlog.due(tmp_path, 300)
    assert swept(tmp_path) == [("bob", "id2")]


def test_an_event_that_was_under_way_does_not_bring_a_removed_user_back(tmp_path: Path) -> None:
    late = event("ann", 1)
    Journal(tmp_path).write([event("bob", 2)])
    assert eventlog.forget(tmp_path, "ann").removed == 0
    Journal(tmp_path).write([late])
    Journal(tmp_path).write([event("ann", 3)])  # she came back
    assert sorted(swept(tmp_path)) == [("ann", "id3"), ("bob", "id2")]
    assert eventlog.forget(tmp_path, "ann").removed == 1
    assert eventlog.forget(tmp_path, "ann").removed == 0
    assert b"ann" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_line_that_was_cut_off_was_never_accepted(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write([event("ann", 1)])
    (path,) = eventlog.journals(tmp_path).iterdir()
    with path.open("ab") as stream:
        stream.write(b'["bob","it')
    assert swept(tmp_path) == [("ann", "id1")]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write([event("ann", 1)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        with pytest.raises(OSError):  # noqa: PT011  # a short write or EFBIG, as the kernel likes
            journal.write([event("bob", n) for n in range(100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    journal.write([event("bob", 2)])
    assert swept(tmp_path) == [("ann", "id1"), ("bob", "id2")]


def test_a_writer_never_waits_for_who_closes_its_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write([event("ann", 1)])
    (path,) = eventlog.journals(tmp_path).iterdir()
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        journal.write([event("ann", 2)])
    assert len(list(eventlog.journals(tmp_path).iterdir())) == 2
    assert sorted(swept(tmp_path)) == [("ann", "id1"), ("ann", "id2")]


def test_only_a_dead_replicas_journal_is_closed_before_its_writer_does(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write([event("ann", 1)])
    assert not eventlog.due(tmp_path, 300)
    eventlog.sweep(tmp_path, 300)
    assert logged(tmp_path) == []
    (path,) = eventlog.journals(tmp_path).iterdir()
    path.rename(path.with_name(f"{time.time_ns() - 400 * 10**9:020d}-1-x.open"))
    assert eventlog.due(tmp_path, 300)
    eventlog.sweep(tmp_path, 300)
    assert logged(tmp_path) == [("ann", "id1")]


def test_the_command_tells_what_it_does_and_sweeps_and_removes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        eventlog.main(io.StringIO(), ["--help"])
    assert "remove a user" in capsys.readouterr().out
    Journal(tmp_path).write([event("ann", 1), event("bob", 2)])
    eventlog.main(io.StringIO(), [str(tmp_path), "-10"])
    assert json.loads(capsys.readouterr().out) == {"events": 2, "removed": 0}
    eventlog.main(io.StringIO('"ann"'), [str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == {"events": 0, "removed": 1}
    assert logged(tmp_path) == [("bob", "id2")]
