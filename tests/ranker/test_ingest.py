from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway import artifacts, config
from slipway.errors import DataError, ParamsError
from slipway.params import Params
from slipway.workloads.ranker import sequences
from slipway.workloads.ranker.ingest import ingest
from tests.conftest import ROOT

Event = tuple[str, str, int]
NAMED = {"user": "user", "item": "item", "time": "time"}
EVENTS: list[Event] = [(f"u{u}", f"i{(u + k) % 5}", 100 * u + k) for u in range(4) for k in range(4)]


def params(source: object, columns: dict[str, Any] | None = None, **more: Any) -> Params:
    return config.parse({"ingest": {"source": str(source), "columns": columns or NAMED, **more}})


def csv_of(path: Path, rows: list[Any], header: str = "user,item,time\n", delimiter: str = ",") -> Path:
    path.write_text(header + "".join(delimiter.join(map(str, row)) + "\n" for row in rows))
    return path


def read(given: Params, out: Path) -> sequences.Sequences:
    """Ingest and load what came of it."""
    with artifacts.writing(out) as folder:
        ingest(given, folder, {})
    return sequences.load(out)


def histories(data: sequences.Sequences) -> dict[str, list[str]]:
    return {key: [data.item_keys[i - 1] for i in data.of(user).tolist()] for user, key in enumerate(data.user_keys)}


EXPECTED = {f"u{u}": [f"i{(u + k) % 5}" for k in range(4)] for u in range(4)}


def test_a_csv_becomes_sequences_in_time_order_with_ids_by_popularity(tmp_path: Path) -> None:
    data = read(params(csv_of(tmp_path / "e.csv", EVENTS[::-1])), tmp_path / "out")
    assert histories(data) == EXPECTED
    assert data.item_events.tolist() == sorted(data.item_events.tolist(), reverse=True)
    assert data.times is not None
    assert data.times[:4].tolist() == [0, 1, 2, 3]
    assert data.items.dtype == np.int32
    assert not (tmp_path / "out" / ".work").exists()


def test_every_form_of_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    table = pa.table({name: [event[k] for event in EVENTS] for k, name in enumerate(NAMED)})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    positions = {"user": 0, "item": 1, "time": 2}
    sources = [
        params(csv_of(tmp_path / "e.csv", EVENTS)),
        params(csv_of(tmp_path / "e.tsv", EVENTS, "user\titem\ttime\n", "\t")),
        params(tmp_path / "e.parquet"),
        params(csv_of(tmp_path / "e.txt", EVENTS, "", "  "), positions),
        params(csv_of(tmp_path / "bare.csv", EVENTS, ""), positions),
    ]
    for number, source in enumerate(sources):
        read(source, tmp_path / f"out{number}")
    columns = ("offsets.npy", "items.npy", "times.npy", "users.parquet", "items.parquet")
    hashes = [[artifacts.sha256(tmp_path / f"out{n}" / name) for name in columns] for n in range(len(sources))]
    assert all(one == hashes[0] for one in hashes)


def test_text_without_a_time_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    source = tmp_path / "games.txt"
    source.write_text("".join(f"{user}   {item}\n\n" for user, item, _ in EVENTS))
    data = read(params(source, {"user": 0, "item": 1}), tmp_path / "out")
    assert histories(data) == EXPECTED
    assert data.times is None


def test_an_iso_timestamp_and_a_fractional_epoch_are_times(tmp_path: Path) -> None:
    stamps = [(u, i, f"2024-05-0{1 + t % 7}T10:00:0{t // 100}+02:00") for u, i, t in EVENTS]
    data = read(params(csv_of(tmp_path / "iso.csv", stamps)), tmp_path / "iso")
    assert data.times is not None
    assert int(data.times[0]) == 1_714_550_400_000_000
    seconds = [(u, i, f"{t}.5") for u, i, t in EVENTS]
    data = read(params(csv_of(tmp_path / "f.csv", seconds)), tmp_path / "f")
    assert data.times is not None
    assert data.times[:2].tolist() == [500_000, 1_500_000]


def test_negative_enormous_and_odd_ids_are_just_keys(tmp_path: Path) -> None:
    keys = ["-7", str(10**40), "0007", '"a, ""b"""', "名"]  # the quoted one holds the delimiter
    rows = [(key, f"i{k % 3}", k) for key in keys for k in range(3)]
    data = read(params(csv_of(tmp_path / "e.csv", rows)), tmp_path / "out")
    assert set(data.user_keys) == {"-7", str(10**40), "0007", 'a, "b"', "名"}


def test_nulls_and_repetitions_are_left_out_counted_and_written_down(tmp_path: Path) -> None:
    rows = [*EVENTS, EVENTS[0], ("u1", "", 7), ("", "i1", 8), ("u2", "i2", "")]
    data = read(params(csv_of(tmp_path / "e.csv", rows)), tmp_path / "out")
    assert data.meta["dropped"] == {"null": 3, "duplicate": 1, "few_events": 0}
    rejects = pyarrow.parquet.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in rejects] == [
        (18, "duplicate"),
        (19, "null"),
        (20, "null"),
        (21, "null"),
    ]
    assert (rejects[0]["user"], rejects[0]["item"]) == EVENTS[0][:2]
    assert histories(data) == EXPECTED


def test_the_filter_goes_on_until_all_that_are_left_have_enough(tmp_path: Path) -> None:
    # x has two users; without y, whose third item is too rare, it has one, and goes too.
    rare = [("y", "x", 1), ("y", "i0", 2), ("y", "rare", 3), ("u0", "x", 900)]
    source = csv_of(tmp_path / "e.csv", [*EVENTS, *rare])
    data = read(params(source, min_item_events=2), tmp_path / "out")
    assert set(data.user_keys) == set(EXPECTED)
    assert "x" not in data.item_keys
    assert data.meta["rows"] == data.meta["events"] + sum(data.meta["dropped"].values())


tables = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=12, max_size=40)


@settings(max_examples=10, deadline=None)
@given(table=tables, random=st.randoms(use_true_random=False))
def test_a_shuffled_table_with_times_gives_what_the_sorted_one_gives(table: list[Any], random: Any) -> None:
    rows = [*EVENTS, *((f"u{user}", f"i{item}", 1000 + time) for time, (user, item) in enumerate(table))]
    shuffled = random.sample(rows, len(rows))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, other = (read(params(csv_of(folder / "e.csv", r)), folder / "out") and artifacts.sha256(folder / "out")
                      for r in (rows, shuffled))  # fmt: skip
    assert one == other


def test_a_source_behind_fsspec_is_read(tmp_path: Path) -> None:
    local = csv_of(tmp_path / "e.csv", EVENTS)
    with fsspec.open("memory://bucket/e.csv", "wb") as remote:
        remote.write(local.read_bytes())
    for source in ("memory://bucket/e.csv", f"file://{local}"):
        assert histories(read(params(source), tmp_path / "out")) == EXPECTED
    with pytest.raises(DataError, match="no such file"):
        read(params("memory://bucket/none.csv"), tmp_path / "none")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_source_behind_http_is_read(tmp_path: Path, web: str) -> None:
    csv_of(tmp_path / "e.csv", EVENTS)
    assert histories(read(params(f"{web}/e.csv"), tmp_path / "out")) == EXPECTED


@pytest.mark.parametrize("delimiter", ";|")
def test_a_csv_may_be_parted_as_spreadsheets_do(tmp_path: Path, delimiter: str) -> None:
    lines = [("user", "item", "bought at", "time"), *((u, f'"{i}"', f"{t},5", t) for u, i, t in EVENTS)]
    source = tmp_path / "e.csv"
    source.write_text("".join(delimiter.join(map(str, line)) + "\n" for line in lines))
    assert histories(read(params(source), tmp_path / "out")) == EXPECTED
    source.write_text("".join(delimiter.join((u, i, f"{t},5", str(t))) + "\n" for u, i, t in EVENTS))
    found = read(params(source, {"user": 0, "item": 1, "time": 3}), tmp_path / "bare")
    assert histories(found) == EXPECTED


def truncated(path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"user": ["a"] * 99, "item": ["b"] * 99}), path)
    path.write_bytes(path.read_bytes()[:-20])


HEAD = "user,item,time\n"
BROKEN = {
    "missing.csv": (None, "no such file"),
    "empty.csv": ("", "the file is empty"),
    "blank.csv": ("\n\n", "nothing but blanks"),
    "header.csv": (HEAD, "no rows under the header"),
    "binary.csv": (b"\x89PNG\0\0\1", "a binary file"),
    "latin.csv": ("user,item,time\nJos\u00e9,b,1\n".encode("latin-1"), "not UTF-8"),
    "odd.xlsx": ("x", "set ingest.format"),
    "no.parquet": ("user,item", "not a Parquet file"),
    "cut.parquet": (truncated, "truncated Parquet file"),
    "tabs.csv": ("user\titem\ttime\na\tb\t1\n", "tabs seem right: set ingest.format to tsv"),
    "column.csv": ("who,item,time\na,b,1\n", "no column 'user'; there are: who, item, time"),
    "short.csv": (HEAD + "a,b,1\na,b\n", "row 3 holds 2 fields, not 3"),
    "long.csv": (HEAD + "a,b,1\na,b,2,3\n", "row 3 holds 4 fields, not 3"),
    "quote.csv": (HEAD + 'a,b,1\na,"b,2\n', "row 3: unterminated quote"),
    "ends.csv": (HEAD + "a,b,1\na,c,2\r\na,d,3\n", "row 3 ends otherwise than those before"),
    "time.csv": (HEAD + "a,b,1\na,b,soon\n", "row 3: time soon is not a number"),
    "mixed.csv": (HEAD + "a,b,2024-01-01\na,b,17\n", "row 3: time 17 is not an ISO date"),
    "user.csv": (HEAD + "".join(f"a,i{k},{k}\n" for k in range(9)), "1 user left after filtering"),
    "item.csv": (HEAD + "".join(f"u{k % 3},i,{k}\n" for k in range(9)), "1 item left after filtering"),
    "few.csv": (HEAD + "a,b,1\nc,d,2\n", "no user left after filtering"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_source_that_is_no_table_of_events_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    source = tmp_path / name
    if callable(content):
        content(source)
    elif content is not None:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as raised:
        read(params(source), tmp_path / "out")
    assert name in str(raised.value)
    assert [path for path in tmp_path.iterdir() if path != source] == []


def test_a_text_row_with_another_number_of_fields_is_named(tmp_path: Path) -> None:
    source = tmp_path / "e.txt"
    source.write_text("1 2\n\n1 2 3\n")
    with pytest.raises(DataError, match="row 3 holds 3 fields, not 2"):
        read(params(source, {"user": 0, "item": 1}), tmp_path / "out")


def test_a_parameter_out_of_range_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"ingest\.min_user_events"):
        params("x.csv", min_user_events=2)


def command(folder: Path, source: Path) -> list[str]:
    (folder / "params.yaml").write_text(
        f"ingest:\n  source: {source}\n  columns: {{user: user, item: item, time: time}}\n"
    )
    return [sys.executable, "-m", "tasks.ingest"]


def test_the_command_says_what_is_wrong_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(tmp_path, tmp_path / "none.csv"), cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"ingest: {tmp_path}/none.csv: no such file; set ingest.source\n"
    assert artifacts.read_json(tmp_path / "reports/ingest.json")["status"] == "failed"
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.slow
def test_a_killed_stage_leaves_nothing_that_the_next_does_not_mend(tmp_path: Path) -> None:
    rows = [(f"u{k % 5000}", f"i{k % 77}", k) for k in range(120_000)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = command(tmp_path, csv_of(tmp_path / "e.csv", rows))
    with subprocess.Popen(started, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 150
        while not list(tmp_path.glob("data/.ingest.*/.work")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "data/ingest").exists()
    assert subprocess.run(started, cwd=tmp_path, env=env, capture_output=True).returncode == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ingest"]
    assert sequences.load(tmp_path / "data/ingest").meta["events"] == 120_000


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, tiny_disk: Path) -> None:
    rows = [(f"u{k % 5000}", f"i{k % 77}", k) for k in range(120_000)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = command(tiny_disk, csv_of(tmp_path / "e.csv", rows))
    done = subprocess.run(started, cwd=tiny_disk, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert list((tiny_disk / "data").iterdir()) == []
