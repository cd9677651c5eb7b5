"""Turn texts into the columns of corpus.py, in bounded memory however many they are.

The source is read twice. First every document is looked at: one that is empty, not UTF-8, or the same as an earlier one
is left out and counted, the others fall to a part by the hash of their text, and the tokenizer is trained on the part
`train` (on a sample of it, where it is large). Then they are cut into tokens. What is remembered of a document
meanwhile is a hash of 8 bytes and its part.
"""

# N tokens, D documents
from __future__ import annotations

import hashlib
import resource
from array import array
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from slipway import artifacts
from slipway.errors import DataError
from slipway.params import Params
from slipway.progress import Progress
from slipway.workloads import tables
from slipway.workloads.llm import corpus, sources
from slipway.workloads.llm.corpus import PARTS
from slipway.workloads.llm.sources import Source
from slipway.workloads.llm.tokenizer import TOKENIZER, Tokens

SHARES = (0.9, 0.05, 0.05)  # of the documents, for train, validation and test
TRAINED_BYTES = 64 << 20  # a tokenizer learns little from more
BATCH_BYTES = 1 << 20  # of text that is cut into tokens at once
MAX_REJECTS = 1000
REASONS = ("empty", "not_utf8", "duplicate")


@dataclass
class Sifted:
    """What the first reading found."""

    fates: array[int] = field(default_factory=lambda: array("b"))
    """Of each document its part in `PARTS`, or one less than 0 where it is left out."""
    dropped: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)


def held_out(params: Params, package: Path, out: Path, report: MutableMapping[str, Any]) -> None:
    """Ingest a source that a model from elsewhere is scored on: every document is a test, cut by its tokenizer."""
    tokenizer = params.ingest.tokenizer.model_copy(update={"file": str(package / TOKENIZER)})
    own = params.ingest.model_copy(update={"tokenizer": tokenizer})
    ingest(params.model_copy(update={"ingest": own}), out, report, (0.0, 0.0, 1.0))


def ingest(
    params: Params, out: Path, report: MutableMapping[str, Any], shares: tuple[float, float, float] = SHARES
) -> None:
    """Write the tokens of `params.ingest.source` into the folder `out`, which is made; figures go to `report`.

    The documents are shared out among train, validation and test by their hash.

    Raises:
        DataError: the source is missing or holds too little text, or the tokenizer cannot be read.
    """
    wanted, source = params.ingest.tokenizer, sources.find(params.ingest.source)
    given = Tokens.load(Path(wanted.file)) if wanted.file else None
    out.mkdir(parents=True)
    sifted = Sifted()
    texts = _sift(source, sifted, shares)
    if given is None:
        tokens = Tokens.train(texts, wanted.vocabulary)
    else:
        tokens = given
        for _ in texts:
            pass
    _refuse_too_little(source, sifted, shares)
    tokens.save(out / TOKENIZER)
    counts, alphabet = _write(source, sifted, tokens, out)
    _write_rejects(sifted, out)
    total, size = sum(part["tokens"] for part in counts.values()), sum(part["bytes"] for part in counts.values())
    meta = {
        "source": source.name,
        "rows": len(sifted.fates),
        "documents": sum(part["documents"] for part in counts.values()),
        "tokens": total,
        "bytes": size,
        "vocabulary": tokens.vocabulary,
        "end": tokens.end,
        "dropped": {reason: sifted.dropped[reason] for reason in REASONS},
        "parts": counts,
    }
    artifacts.write_json(out / "meta.json", meta)
    np.save(out / "bytes.npy", alphabet)
    for key, value in meta.items():
        report[key] = value
    report["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _sift(source: Source, sifted: Sifted, shares: tuple[float, ...]) -> Iterator[str]:
    """Decide on every document, and yield texts of the part `train` for the tokenizer."""
    seen: set[int] = set()
    sample = min(1.0, TRAINED_BYTES / source.size_bytes)
    with Progress("ingest: read", source.size_bytes / 1e6, "MB") as progress:
        for document in source.documents():
            progress.advance(len(document.data) / 1e6)
            text, wrong = _text(document.data), None
            key = int.from_bytes(hashlib.sha256(document.data).digest()[:8], "big")
            if text is None:
                wrong = "not_utf8"
            elif not text.strip():
                wrong = "empty"
            elif key in seen:
                wrong = "duplicate"
            if wrong is None:
                seen.add(key)
                place, rest = divmod(key, 1 << 32)  # two independent draws from one hash
                part = int(np.searchsorted(np.cumsum(shares)[:-1], place / (1 << 32), side="right"))
                sifted.fates.append(part)
                if PARTS[part] == "train" and rest < sample * (1 << 32):
                    yield text or ""
            else:
                sifted.fates.append(-1)
                sifted.dropped[wrong] += 1
                if sifted.dropped[wrong] <= MAX_REJECTS:
                    row = {"document": len(sifted.fates), "reason": wrong, "name": document.name}
                    sifted.rejects.append(row)


def _text(data: bytes) -> str | None:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None


def _refuse_too_little(source: Source, sifted: Sifted, shares: tuple[float, ...]) -> None:
    for number, part in enumerate(PARTS):
        if shares[number] and number not in sifted.fates:
            kept = sum(fate >= 0 for fate in sifted.fates)
            left = ", ".join(f"{count} {fate}" for fate, count in sifted.dropped.items()) or "none"
            raise DataError(
                f"{source.name}: {kept} documents are too few to give each of {', '.join(PARTS)} one ({part} has none; "
                f"left out: {left}); give more text: some 100 documents of a few kB"
            )


def _write(source: Source, sifted: Sifted, tokens: Tokens, out: Path) -> tuple[dict[str, dict[str, int]], Any]:
    """Cut the documents that are kept into tokens; counts by part, and how often each byte occurs, [256]."""
    with ExitStack() as stack:
        columns = [stack.enter_context(_Columns(out, part, corpus.kind(tokens.vocabulary))) for part in PARTS]
        progress = stack.enter_context(Progress("ingest: tokens", source.size_bytes / 1e6, "MB"))
        for batch in _batches(source, sifted):
            for (name, fate, text), ids in zip(batch, tokens.encode([text for _, _, text in batch]), strict=True):
                columns[fate].add(name, text, [*ids, tokens.end])
            progress.advance(sum(len(text) for _, _, text in batch) / 1e6)
    return {part: column.counts for part, column in zip(PARTS, columns, strict=True)}, sum(c.alphabet for c in columns)


def _batches(source: Source, sifted: Sifted) -> Iterator[list[tuple[str, int, str]]]:
    """Yield documents that are kept: name, part and text, some at a time."""
    batch: list[tuple[str, int, str]] = []
    size = 0
    for document, fate in zip(source.documents(), sifted.fates, strict=False):  # a log may grow between the readings
        text = _text(document.data) if fate >= 0 else None
        if text is not None:
            batch.append((document.name, fate, text))
            size += len(document.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Columns:
    """The files of one part, written in order; how long they become is known at the end."""

    def __init__(self, out: Path, part: str, kind: type[corpus.Kind]) -> None:
        self._tokens = _Column(out / f"{part}.npy", kind)
        self._offsets = _Column(out / f"{part}.offsets.npy", np.int64)
        names = {"name": "string", "bytes": "int64", "tokens": "int64", "sha256": "string"}
        self._table = tables.Rows(out / f"{part}.parquet", names)
        self._offsets.write([0])
        self.alphabet = np.zeros(256, np.int64)
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, text: str, ids: list[int]) -> None:
        """Append one document."""
        data = text.encode()
        row = {"documents": 1, "tokens": len(ids), "bytes": len(data)}
        self.counts = {key: value + row[key] for key, value in self.counts.items()}
        self._tokens.write(ids)
        self._offsets.write([self.counts["tokens"]])
        self.alphabet += np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        self._table.write((name, len(data), len(ids), hashlib.sha256(data).hexdigest()))

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._tokens.close()
        self._offsets.close()
        self._table.close()


class _Column:
    """A .npy file of one dimension that grows; not mapped into memory, where a full disk would be a signal."""

    def __init__(self, path: Path, kind: Any) -> None:
        self._file, self._kind, self._length = path.open("wb"), np.dtype(kind), 0
        self._header()

    def _header(self) -> None:
        # NumPy leaves room in the header for the length to grow, so writing it again at the end moves nothing.
        descr = np.lib.format.dtype_to_descr(self._kind)
        shape = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, shape)

    def write(self, values: list[int]) -> None:
        self._file.write(np.array(values, self._kind).tobytes())
        self._length += len(values)

    def close(self) -> None:
        with self._file:
            self._file.seek(0)
            self._header()


def _write_rejects(sifted: Sifted, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema({"document": pa.int64(), "reason": pa.string(), "name": pa.string()})
    pyarrow.parquet.write_table(pa.Table.from_pylist(sifted.rejects, schema), out / "rejects.parquet")
