"""`python -m tasks.predict`: a table of answers, the same as the service's, whatever ends a run before its time."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from slipway.serving import model as models
from slipway.serving import offline
from slipway.serving.model import Model, Sample
from slipway.workloads.base import Query, Requests, part
from slipway.workloads.ranker.schema import RankerEndpoint
from tests.classifier import data as pictures
from tests.conftest import ROOT
from tests.llm import data as texts
from tests.serving import packages

USERS = 5000  # some chunks


def command(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLIPWAY_HOME": str(folder / "home")}
    words = [sys.executable, "-m", "tasks.predict", *map(str, arguments)]
    return subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_and_the_table_is_the_services_answers(package: Path, tmp_path: Path) -> None:
    rng, table = np.random.default_rng(0), tmp_path / "events.csv"
    rows = [f"u{u:05d},item{rng.integers(1, packages.ITEMS + 1)}" for u in range(USERS) for _ in range(4)]
    table.write_text("\n".join([*rows, "u99999,a novelty"]) + "\n")
    arguments = ("--source", table, "--out", "scores.csv", "--model", package, "--k", "3")
    chunks = tmp_path / ".scores.csv.chunks"
    first = command(tmp_path, *arguments)
    while not (chunks / "000000.parquet").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "scores.csv").exists()
    second = command(tmp_path, *arguments)
    told = second.communicate(timeout=120)[1]
    assert second.returncode == 0, told
    assert not chunks.exists()
    report = json.loads((tmp_path / "reports" / "predict.json").read_text())
    assert 1 <= report["resumed_chunks"] <= -(-USERS // offline.CHUNK)
    with (tmp_path / "scores.csv").open() as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == (USERS + 1) * 3
    assert list(found[0]) == ["user", "rank", "item", "score"]
    endpoint, model = RankerEndpoint(package), models.load(package, "1", 1)
    for user in ("u00000", "u04321", "u99999"):
        history = [line.split(",")[1] for line in table.read_text().splitlines() if line.startswith(user)]
        query = endpoint.decode(('{"k": 3, "history": ["' + '", "'.join(history) + '"]}').encode())
        (outputs,) = model.predict([Sample(query, endpoint.outputs)])
        wanted = [each["item"] for each in endpoint.encode(query, outputs)["items"]]
        assert [row["item"] for row in found if row["user"] == user] == wanted


def test_what_is_finished_is_never_asked_again(package: Path, tmp_path: Path) -> None:
    asked: list[int] = []
    model = models.load(package, "1", 1)

    def requests(most: int) -> Requests:
        def read(start: int) -> Iterator[tuple[str, Query | None]]:
            for number in range(start, 50):
                if number == most:
                    raise KeyboardInterrupt
                asked.append(number)
                query = Query({"history": np.array([number + 1])}, {"k": 2, "ignored": []})
                yield f"user {number}", None if number == 33 else query

        return Requests("user", "items", {"item": "string", "score": "float64"}, 50, read)

    for most in (25, 47):
        with pytest.raises(KeyboardInterrupt):
            offline.run(model, requests(most), tmp_path, chunk=10)
    offline.run(model, requests(99), tmp_path, chunk=10)
    assert asked == [*range(25), *range(20, 47), *range(40, 50)]
    rows, unread = offline.write(tmp_path, tmp_path / "out.parquet")
    assert (rows, unread) == (49 * 2 + 1, ["user 33"])
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["user"] for row in found if row["rank"] in (1, None)] == [f"user {number}" for number in range(50)]
    assert found[66] == {"user": "user 33", "rank": None, "item": None, "score": None}


def test_another_source_model_or_k_begins_anew(package: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.csv"
    for rows, k in ((5, 2), (7, 2), (7, 4)):
        small.write_text("\n".join(f"u{n},item{n + 1}" for n in range(rows)))
        run = command(tmp_path, "--source", small, "--out", "a.parquet", "--model", package, "--k", str(k))
        assert (run.communicate(timeout=60)[1], run.returncode)[1] == 0
        assert pq.read_table(tmp_path / "a.parquet").num_rows == rows * k


def test_what_cannot_be_scored_is_named(package: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.csv").write_text("a,b\nc,d\ne\n")
    for arguments, told in (
        (("--source", "torn.csv"), "--out are needed"),
        (("--source", "torn.csv", "--out", "a.txt"), "must end in .parquet or .csv"),
        (("--source", "none.csv", "--out", "a.csv"), "none.csv: no such file"),
        (("--source", "torn.csv", "--out", "a.csv"), "torn.csv: row 3 holds 1 fields, not 2"),
        (("--source", "torn.csv", "--out", "a.csv", "--k", "0"), "--k: answers of each sample, 1..100 (got 0)"),
    ):
        run = command(tmp_path, *arguments, "--model", package)
        error = run.communicate(timeout=60)[1]
        assert (run.returncode, "Traceback" in error) == (2, False), error
        assert told in error


def test_pictures_and_texts_are_read_from_anywhere(tmp_path: Path) -> None:
    """Without a model: the requests alone, with what cannot be read."""
    shots = pictures.folder(tmp_path / "shots", {"a": 3})
    (shots / "loose.jpg").write_bytes(b"no picture")
    (tmp_path / "classifier.json").write_text('{"classes": ["a", "b"], "image_size": 16, "stored_size": 20}')
    given = pictures.params(shots)
    requests = part("classifier", "offline").requests(given, tmp_path, tmp_path / "work", 2)
    read = list(requests.read(1))
    assert [name for name, query in read if query is None] == ["loose.jpg"]
    assert len(read) == requests.total - 1
    assert {query.inputs["image"].shape for _, query in read if query is not None} == {(16, 16, 3)}

    words = texts.folder(tmp_path / "texts", texts.texts(3))
    (words / "broken.txt").write_bytes(b"\xff\xfe\xff")
    from slipway.workloads.llm.tokenizer import TOKENIZER, Tokens

    Tokens.train(iter(texts.texts(3)), 300).save(tmp_path / TOKENIZER)
    (tmp_path / "llm.json").write_text('{"context_length": 8}')
    found = list(part("llm", "offline").requests(texts.params(words), tmp_path, tmp_path, 4).read(0))
    assert [name for name, query in found if query is None] == ["broken.txt"]
    assert {len(query.inputs["tokens"]) for _, query in found if query is not None} == {8}


def test_the_batch_is_of_the_sizes_that_fit(package: Path) -> None:
    model: Model = models.load(package, "1", 1)
    queries = [Query({"history": np.array([1, 2])}, {"k": 2, "ignored": []})] * 20
    assert offline.best_batch(model, queries) in offline.BATCHES[:3]
    assert offline.best_batch(model, []) == 0
