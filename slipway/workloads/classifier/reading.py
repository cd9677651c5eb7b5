"""Read the files of a source by several processes, each file once: hashed, checked, decoded, and looked at.

The results come in the order of the entries, whatever the processes do, so that the same source gives the same bytes.
Only a few batches are under way at a time: memory does not grow with the source. A process ends with the one that
started it, even if that one is killed.
"""

# S stored side
from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from slipway import commands
from slipway.errors import PictureError, TransientError
from slipway.workloads.classifier import dali, decoding, likeness
from slipway.workloads.classifier.decoding import Limits, Pixels
from slipway.workloads.classifier.sources import Entry

BATCH = 16
AHEAD = 3
"""Batches under way for one process."""
FEW = 256
"""Files that one process reads before a second would have started."""
THUMB = 96
"""Side of the small picture of a refused file, in pixels."""
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}


@dataclass(frozen=True)
class Seen:
    """What there is to know of one file."""

    entry: Entry
    data: bytes
    """The file as it came; empty where it could not be read or is too large to be."""
    digest: bytes
    """SHA-256 of it; empty where it was not read."""
    size_bytes: int
    fault: str | None = None
    detail: str = ""
    format: str | None = None
    width: int | None = None
    height: int | None = None
    notes: tuple[str, ...] = ()
    pixels: Pixels | None = None
    """[S, S, 3]; None for a fault."""
    hash: int = 0
    """The difference hash."""
    thumb: bytes | None = None
    """JPEG of what can be seen of a faulty file."""


@dataclass(frozen=True)
class Reader:
    """What a process has to know to read files."""

    root: Path
    side: int
    limits: Limits

    def read(self, entries: Sequence[Entry]) -> list[Seen]:
        """Read a batch of files, whatever is wrong with them."""
        loaded = [self._load(entry) for entry in entries]
        squares = self._by_gpu([one if isinstance(one, bytes) else b"" for one in loaded])
        return [
            self._look(entry, one, square) if isinstance(one, bytes) else one
            for entry, one, square in zip(entries, loaded, squares, strict=True)
        ]

    def _load(self, entry: Entry) -> bytes | Seen:
        path, size = self.root / entry.name, 0
        try:
            size = path.stat().st_size
            if size > self.limits.max_bytes:
                return Seen(entry, b"", b"", size, "huge", f"{size:,} bytes, over {self.limits.max_bytes:,}")
            with path.open("rb") as file:
                return file.read(self.limits.max_bytes + 1)  # it may have grown meanwhile
        except OSError as error:
            return Seen(entry, b"", b"", size, "unreadable", str(error.strerror))

    def _by_gpu(self, files: Sequence[bytes]) -> list[Pixels | None]:
        """Squares of those that a GPU decodes; None for all others, and for all where there is none."""
        squares: list[Pixels | None] = [None] * len(files)
        if dali.available():
            at = [number for number, data in enumerate(files) if decoding.plain(data, self.limits)]
            for number, square in zip(at, dali.decode([files[number] for number in at], self.side), strict=True):
                squares[number] = square
        return squares

    def _look(self, entry: Entry, data: bytes, square: Pixels | None) -> Seen:
        digest = hashlib.sha256(data).digest()
        try:
            picture = decoding.decode(data, self.side, self.limits, square)
        except PictureError as error:
            return Seen(entry, data, digest, len(data), error.fault, str(error), thumb=_thumb(data, error.fault))
        ending, notes = PurePosixPath(entry.name).suffix.lower(), picture.notes
        if ending not in ENDINGS[picture.format]:
            notes = (*notes, "wrong_extension")
        return Seen(
            entry,
            data,
            digest,
            len(data),
            format=picture.format,
            width=picture.width,
            height=picture.height,
            notes=notes,
            pixels=picture.pixels,
            hash=likeness.difference_hash(picture.pixels),
        )


def _thumb(data: bytes, fault: str) -> bytes | None:
    """Show as much of a faulty file as there is; a huge one is not decoded at all."""
    if fault not in ("truncated", "tiny"):
        return None
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES, before = True, ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        image = Image.open(io.BytesIO(data), formats=decoding.formats())
        image.draft("RGB", (THUMB, THUMB))
        image.thumbnail((THUMB, THUMB))
        out = io.BytesIO()
        image.convert("RGB").save(out, "JPEG", quality=80)
        return out.getvalue()
    except (*decoding.BROKEN, MemoryError):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def read(reader: Reader, entries: Sequence[Entry], processes: int | None = None) -> Iterator[Seen]:
    """Read `entries` in their order by `processes` (None: one a core, one alone for a few files).

    Raises:
        TransientError: a process was killed, by lack of memory or by a decoder that crashed; names the files.
    """
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), 1 + len(entries) // FEW)
    batches = (entries[at : at + BATCH] for at in range(0, len(entries), BATCH))
    if processes <= 1:
        for batch in batches:
            yield from reader.read(batch)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=commands.end_with_caller) as pool:
        under_way: deque[tuple[Sequence[Entry], Future[list[Seen]]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, pool.submit(reader.read, batch)))
                if len(under_way) > AHEAD * processes:
                    yield from _result(*under_way.popleft())
            while under_way:
                yield from _result(*under_way.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(batch: Sequence[Entry], future: Future[list[Seen]]) -> list[Seen]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise TransientError(
            f"a process that reads pictures was killed between {batch[0].name} and some files after {batch[-1].name}: "
            "out of memory (lower ingest.images.max_megapixels), or a file that crashes the decoder (remove it)"
        ) from error


def usual_side(root: Path, entries: Sequence[Entry], max_bytes: int, sample: int = 200) -> int:
    """Median of the shorter sides of some pictures, evenly spaced among the entries, by their headers; 0 for none."""
    sides = []
    for entry in entries[:: max(1, len(entries) // sample)]:
        try:
            with (root / entry.name).open("rb") as file, Image.open(file, formats=decoding.formats()) as image:
                sides.append(min(image.size))
        except (*decoding.BROKEN, Image.DecompressionBombError):
            continue
    return int(np.median(sides)) if sides else 0
