"""Score many samples without a service: in chunks that are kept, so that a run which is killed goes on where it was.

In the folder of a run: 000000.parquet, 000001.parquet, … hold the answers of `CHUNK` samples each, whole or absent.
A table has a row an answer: the sample's name, rank (from 1), and what the workload says; a sample that cannot be read
has one row of nulls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway import artifacts
from slipway.progress import Progress
from slipway.serving.model import Model, Sample
from slipway.workloads.base import Query, Requests, Tensors

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 2048
BATCHES = (1, 4, 16, 64, 256)
TRIES = 3


def done(folder: Path) -> int:
    """Chunks that a run before has finished."""
    return next(number for number in count() if not _chunk(folder, number).exists())


def run(model: Model, requests: Requests, folder: Path, chunk: int = CHUNK) -> int:
    """Score every sample that is not scored yet; the size of the batches, 0 if nothing was left."""
    number, batch = done(folder), 0
    samples = requests.read(number * chunk)
    with Progress("predict", requests.total, "samples", start=min(number * chunk, requests.total or 0)) as progress:
        while some := list(islice(samples, chunk)):
            queries = [query for _, query in some if query is not None]
            batch = batch or best_batch(model, queries)
            found = iter(_answers(model, queries, max(batch, 1)))
            answers = [(name, None if query is None else next(found)) for name, query in some]
            table = _table(requests, answers)
            with artifacts.writing(_chunk(folder, number)) as beside:
                _parquet().write_table(table, beside)
            number += 1
            progress.advance(len(some), batch=batch)
    return batch


def best_batch(model: Model, queries: Sequence[Query]) -> int:
    """Size of the batches at which the engine answers the most samples a second; 0 without a query."""
    rates = {}
    for size in BATCHES[: 1 + sum(size <= len(queries) for size in BATCHES[1:])] if queries else ():
        batch, best = [Sample(query, model.endpoint.outputs) for query in queries[:size]], float("inf")
        for _ in range(TRIES):
            began = time.perf_counter()
            model.predict(batch)
            best = min(best, time.perf_counter() - began)
        rates[size] = size / best
    return max(rates, key=rates.__getitem__, default=0)


def _answers(model: Model, queries: Sequence[Query], batch: int) -> list[Sequence[dict[str, Any]]]:
    """Answer every query; those of like size share a batch, which means less padding."""
    order = sorted(range(len(queries)), key=lambda at: sum(each.size for each in queries[at].inputs.values()))
    outputs: list[Tensors] = [{}] * len(queries)
    for begin in range(0, len(order), batch):
        rows = order[begin : begin + batch]
        found = model.predict([Sample(queries[at], model.endpoint.outputs) for at in rows])
        for at, each in zip(rows, found, strict=True):
            outputs[at] = each
    return [model.endpoint.encode(query, each) for query, each in zip(queries, outputs, strict=True)]  # type: ignore[misc]


def _table(requests: Requests, answers: Sequence[tuple[str, Any]]) -> pa.Table:
    import pyarrow as pa

    rows = [row for name, answer in answers for row in _rows(requests, name, answer)]
    return pa.Table.from_pylist(rows, pa.schema({requests.key: "string", "rank": "int32", **requests.columns}))


def _rows(requests: Requests, name: str, answer: Any) -> Iterator[dict[str, Any]]:
    if answer is None:
        yield {requests.key: name}
    else:
        for rank, each in enumerate(answer[requests.answers], start=1):
            yield {requests.key: name, "rank": rank, **each}


def write(folder: Path, out: Path) -> tuple[int, list[str]]:
    """Join the chunks into one table at `out`, CSV or Parquet by its ending; its rows, and what was not read."""
    import pyarrow.csv

    rows, unread = 0, []
    tables = (_parquet().read_table(_chunk(folder, number)) for number in range(done(folder)))
    first = next(tables)
    with artifacts.writing(out) as beside:
        writer = pyarrow.csv.CSVWriter if out.suffix == ".csv" else _parquet().ParquetWriter
        with writer(beside, first.schema) as table:
            for each in (first, *tables):
                table.write_table(each)
                rows += each.num_rows
                unread += each.column(0).filter(pyarrow.compute.is_null(each.column("rank"))).to_pylist()
    return rows, unread


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def _parquet() -> Any:
    import pyarrow.parquet

    return pyarrow.parquet
