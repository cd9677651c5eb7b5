"""Turn a folder of class folders into the shards of images.py, in bounded memory however many pictures there are.

Every file is read once, by several processes (reading.py): its content goes to the shards if it is a picture and was
not there before; what is wrong or unusual goes to the table of files. Then parting.py says what is used, and for what.
What is remembered of a file meanwhile is its name and some 200 bytes; pixels and originals go to disk as they come.
"""

# F files, C contents, N pictures used, S stored side
from __future__ import annotations

import resource
import shutil
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.errors import DataError
from slipway.params import ImagesParams, Params
from slipway.progress import Progress
from slipway.workloads import tables
from slipway.workloads.classifier import images, likeness, parting, reading, sources
from slipway.workloads.classifier.decoding import Limits
from slipway.workloads.classifier.images import MARGIN, PARTS
from slipway.workloads.classifier.likeness import Pairs
from slipway.workloads.classifier.parting import FATES
from slipway.workloads.classifier.reading import Reader, Seen
from slipway.workloads.classifier.schema import ABOUT
from slipway.workloads.classifier.sources import Source

SHARD_BYTES = 256 << 20
MAX_REFUSED = 200
NOTES = ("wrong_extension", "cmyk", "grey", "palette", "alpha", "deep", "animated", "rotated")
FAULTS = ("unreadable", "empty", "not_an_image", "truncated", "tiny", "huge")


def held_out(params: Params, package: Path, out: Path, report: MutableMapping[str, Any]) -> None:
    """Ingest a source that a model from elsewhere is scored on: every picture is for the test, in the model's size."""
    size = artifacts.read_json(package / ABOUT)["image_size"]
    own = params.ingest.model_copy(update={"images": params.ingest.images.model_copy(update={"image_size": size})})
    ingest(params.model_copy(update={"ingest": own}), out, report, ("test",))


def ingest(params: Params, out: Path, report: MutableMapping[str, Any], wanted_parts: Sequence[str] = PARTS) -> None:
    """Write the pictures of `params.ingest.source` into the folder `out`, which is made; figures go to `report`.

    Where one part alone is wanted, all pictures are in it, whatever the source says.

    Raises:
        DataError: the source is missing, or holds too little that can be used.
        TransientError: a process that reads was killed, or a server did not answer.
    """
    wanted = params.ingest.images
    limits = Limits(int(wanted.max_mb * 1e6), int(wanted.max_megapixels * 1e6), wanted.min_side)
    work = out / ".work"
    work.mkdir(parents=True)
    try:
        source = sources.find(params.ingest.source, work, limits.max_bytes)
        size = _image_size(source, wanted, limits)
        read = _read(source, Reader(source.root, _stored(size), limits), out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    classes = sorted({entry.label for entry in source.entries})
    fate, twin, pairs = _part(source, read, classes, wanted, out, wanted_parts)
    counts = _write_columns(source, read, classes, fate, out, wanted_parts)
    _write_files(source, read, fate, twin, out)
    _write_pairs(pairs, out)
    meta = {
        "source": source.name,
        "files": len(source.entries),
        **counts,
        "classes": [_plain(name) for name in classes],
        "image_size": size,
        "stored_size": _stored(size),
        "shard_rows": read.shard_rows,
        "shards": -(-len(read.digests) // read.shard_rows),
        "contents": len(read.digests),
        "original_bytes": int(read.offsets[-1]),
        "dropped": {name: int((fate == code).sum()) for code, name in enumerate(FATES) if name not in PARTS},
        "faults": {name: read.faults[name] for name in FAULTS},
        "notes": {name: read.notes[name] for name in NOTES},
        "passed_over": source.passed_over,
        "near_pairs": len(pairs.first),
    }
    artifacts.write_json(out / "meta.json", meta)
    for key, value in meta.items():
        report[key] = value
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    report["peak_memory_mb"], report["peak_memory_of_a_reader_mb"] = (round(used / 1024) for used in usage)


def _image_size(source: Source, wanted: ImagesParams, limits: Limits) -> int:
    """Side of the model's input: as asked, or the largest multiple of 32 that most pictures fill."""
    if wanted.image_size != "auto":
        return wanted.image_size
    usual = reading.usual_side(source.root, source.entries, limits.max_bytes)
    return min(160, max(32, usual // 32 * 32))


def _stored(size: int) -> int:
    return round(size * MARGIN / 2) * 2


@dataclass
class Read:
    """What is remembered of the files that were read."""

    shard_rows: int
    content: npt.NDArray[np.int64]
    """[F] content of each file; -1 for a fault."""
    digests: list[bytes] = field(default_factory=list)
    """Of the contents, [C]."""
    offsets: list[int] = field(default_factory=lambda: [0])
    hashes: list[int] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


def _read(source: Source, reader: Reader, out: Path) -> Read:
    """Read every file: contents go to the shards, a row each to `out/.work/rows.parquet`."""
    rows = max(1, SHARD_BYTES // (3 * reader.side**2))
    read = Read(rows, np.full(len(source.entries), -1, np.int64))
    known: dict[bytes, int] = {}
    refused: list[dict[str, Any]] = []
    with (
        _Shards(out, rows, reader.side) as shards,
        tables.Rows(out / "rows.parquet", COLUMNS) as table,
        Progress("ingest: read", len(source.entries), "files") as progress,
    ):
        for number, seen in enumerate(reading.read(reader, source.entries)):
            if seen.pixels is not None:
                if seen.digest not in known:
                    known[seen.digest] = len(known)
                    shards.add(seen.pixels, seen.data)
                    _remember(read, seen)
                read.content[number] = known[seen.digest]
            elif len(refused) < MAX_REFUSED:
                refused.append(
                    {"name": _plain(seen.entry.name), "fault": seen.fault, "detail": seen.detail, "thumb": seen.thumb}
                )
            read.notes.update(seen.notes)
            read.faults.update([seen.fault] if seen.fault else [])
            table.write(_row(seen))
            progress.advance()
    _write_refused(refused, out)
    return read


def _remember(read: Read, seen: Seen) -> None:
    read.digests.append(seen.digest)
    read.offsets.append(read.offsets[-1] + len(seen.data))
    read.hashes.append(seen.hash)


def _plain(name: str) -> str:
    """A name that is no UTF-8 as one that can be written."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Shards:
    """The shards of pixels and originals, written in order; not mapped, where a full disk would be a signal."""

    def __init__(self, out: Path, rows: int, side: int) -> None:
        self._out, self._rows, self._side = out, rows, side
        self._count = 0
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def __enter__(self) -> Self:
        return self

    def add(self, pixels: npt.NDArray[np.uint8], original: bytes) -> None:
        """Append one content."""
        if self._count % self._rows == 0:
            self._close()
            number = self._count // self._rows
            self._files = (
                (self._out / f"pixels-{number:05d}.npy").open("wb"),
                (self._out / f"originals-{number:05d}.bin").open("wb"),
            )
            self._header(self._rows)
        assert self._files is not None
        self._files[0].write(pixels.tobytes())
        self._files[1].write(original)
        self._count += 1

    def _header(self, rows: int) -> None:
        # NumPy leaves room in the header for the length to change, so writing it again at the end moves nothing.
        assert self._files is not None
        shape = (rows, self._side, self._side, 3)
        np.lib.format.write_array_header_1_0(self._files[0], {"descr": "|u1", "fortran_order": False, "shape": shape})

    def _close(self) -> None:
        if self._files is not None:
            self._files[0].seek(0)
            self._header((self._count - 1) % self._rows + 1)
            for file in self._files:
                file.close()
            self._files = None

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._close()


COLUMNS = {
    "name": "string",
    "class": "string",
    "source_part": "string",
    "bytes": "int64",
    "sha256": "string",
    "format": "string",
    "width": "int32",
    "height": "int32",
    "fault": "string",
    "detail": "string",
    "notes": "string",
}
"""Of the table of files, as they are read."""


def _row(seen: Seen) -> tuple[Any, ...]:
    entry = seen.entry
    named = _plain(entry.name), _plain(entry.label), entry.part
    held = seen.size_bytes, seen.digest.hex() or None, seen.format, seen.width, seen.height
    return (*named, *held, seen.fault, seen.detail, " ".join(seen.notes))


def _part(
    source: Source,
    read: Read,
    classes: Sequence[str],
    wanted: ImagesParams,
    out: Path,
    wanted_parts: Sequence[str],
) -> tuple[parting.Codes, npt.NDArray[np.int64], Pairs]:
    """Decide on every file: its fate, the file it repeats or -1, and which files look alike."""
    numbers = {label: number for number, label in enumerate(classes)}
    codes: dict[str | None, int] = {part: code for code, part in enumerate(PARTS)}
    codes[None] = parting.UNSAID
    labels = np.fromiter((numbers[entry.label] for entry in source.entries), np.int64, len(source.entries))
    said = (codes[entry.part if len(wanted_parts) > 1 else wanted_parts[0]] for entry in source.entries)
    given = np.fromiter(said, np.int8, len(source.entries))
    files = parting.Files(read.content, labels, given)
    fate, twin = parting.kept(files, parting.sources_parts(files))
    # From here on contents stand for files: each that is still in has one file, its own.
    inside = np.flatnonzero((fate >= parting.UNSAID) & (fate <= parting.TEST))
    content = read.content[inside]
    hashes = np.array([read.hashes[c] for c in content], np.uint64)
    shards = images.shards(out, -(-len(read.digests) // read.shard_rows))
    pairs = likeness.near(hashes, lambda at: images.rows(shards, content[at], read.shard_rows), wanted.near_bits)
    mine = fate[inside]
    family = parting.families_to_part(len(inside), mine, pairs)
    words = np.frombuffer(b"".join(read.digests[c][:16] for c in content), ">u8").reshape(-1, 2).astype(np.uint64)
    mine = parting.parted(mine, family, words, parting.Shares(wanted.validation_share, wanted.test_share))
    leaks, of = parting.leaking(mine, pairs)
    if wanted.leaks == "quarantine":
        mine[leaks] = parting.LEAK
        twin[inside[leaks]] = inside[of]
    fate[inside] = mine
    return fate, twin, Pairs(inside[pairs.first], inside[pairs.second], pairs.bits, pairs.correlation)


def _write_columns(
    source: Source, read: Read, classes: Sequence[str], fate: parting.Codes, out: Path, wanted_parts: Sequence[str]
) -> dict[str, Any]:
    used = np.flatnonzero((fate >= 0) & (fate < len(PARTS)))
    numbers = {label: number for number, label in enumerate(classes)}
    labels = np.fromiter((numbers[source.entries[f].label] for f in used), np.int64, len(used))
    split = fate[used].astype(np.uint8)
    parts = {part: int((split == code).sum()) for code, part in enumerate(PARTS)}
    empty = [part for part in wanted_parts if not parts[part]]
    if empty:
        dropped = Counter(FATES[code] for code in fate if code >= len(PARTS))
        raise DataError(
            f"{source.name}: of {len(fate):,} files none is left for {', '.join(empty)} ({dict(dropped)} left out); "
            "give more pictures, or larger shares by ingest.images"
        )
    np.save(out / "labels.npy", labels)
    np.save(out / "split.npy", split)
    np.save(out / "contents.npy", read.content[used])
    np.save(out / "offsets.npy", np.array(read.offsets, np.int64))
    np.save(out / "digests.npy", np.frombuffer(b"".join(read.digests), np.uint8).reshape(-1, 32))
    by_class = {
        part: np.bincount(labels[split == code], minlength=len(classes)).tolist() for code, part in enumerate(PARTS)
    }
    return {"pictures": len(used), "parts": parts, "by_class": by_class}


def _write_files(source: Source, read: Read, fate: parting.Codes, twin: npt.NDArray[np.int64], out: Path) -> None:
    """Complete the rows that were written while reading by what became of each file."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = out / "rows.parquet"
    start = 0
    with pyarrow.parquet.ParquetFile(rows) as file:
        schema = file.schema_arrow
        for name, kind in (("fate", pa.string()), ("content", pa.int64()), ("twin", pa.int64())):
            schema = schema.append(pa.field(name, kind))
        with pyarrow.parquet.ParquetWriter(out / "files.parquet", schema) as writer:
            for batch in file.iter_batches(tables.ROWS):
                here = slice(start, start + batch.num_rows)
                start += batch.num_rows
                twins = [None if one < 0 else one for one in twin[here].tolist()]
                more = [pa.array([FATES[code] for code in fate[here]]), pa.array(read.content[here])]
                writer.write_batch(pa.record_batch([*batch.columns, *more, pa.array(twins, pa.int64())], schema=schema))
    rows.unlink()


def _write_pairs(pairs: Pairs, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"first": pairs.first, "second": pairs.second, "bits": pairs.bits, "correlation": pairs.correlation}
    pyarrow.parquet.write_table(pa.table(columns), out / "pairs.parquet")


def _write_refused(refused: list[dict[str, Any]], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema({"name": pa.string(), "fault": pa.string(), "detail": pa.string(), "thumb": pa.binary()})
    pyarrow.parquet.write_table(pa.Table.from_pylist(refused, schema), out / "refused.parquet")
