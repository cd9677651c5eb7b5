"""The classifier's data between stages: every picture decoded once, mapped into memory, not read.

    labels.npy             int64 [N]          class of each picture that is used, an index into `classes`
    split.npy              uint8 [N]          0 train, 1 validation, 2 test
    contents.npy           int64 [N]          where its pixels and its original are
    pixels-00000.npy       uint8 [R, S, S, 3] RGB; content c is row c % R of shard c // R
    originals-00000.bin    bytes              the files as they came, one after the other, R to a shard
    offsets.npy            int64 [C+1]        where each original begins among all of them
    digests.npy            uint8 [C, 32]      SHA-256 of each original: a content is kept once
    files.parquet          one row a file of the source, sorted by name: what it is and what became of it
    pairs.parquet          near duplicates
    refused.parquet        the first files that were refused, each with a small JPEG where there is anything to see
    meta.json              source, classes, counts, sizes, ...; written last

S is larger than the model's input (`image_size`), so that training can cut out of it.
"""

# N pictures used, C contents, R contents of a shard, S stored side
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.errors import DataError

PARTS = ("train", "validation", "test")
MARGIN = 1.125
"""Stored side over the model's: room for random crops, as 180 is to 160."""

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Images:
    """The pictures of a folder that `ingest` wrote; positions are 0..N-1."""

    folder: Path
    classes: tuple[str, ...]
    """Names, sorted."""
    labels: Ints
    """[N] index into `classes`."""
    split: Bytes
    """[N] index into PARTS."""
    contents: Ints
    """[N]"""
    shards: Sequence[Bytes]
    """Each [R, S, S, 3], the last one shorter."""
    offsets: Ints
    """[C+1]"""
    digests: Bytes
    """[C, 32]"""
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Side of the square that the model sees, in pixels."""
        return int(self.meta["image_size"])

    @property
    def stored_size(self) -> int:
        """Side of the square that is stored, in pixels."""
        return int(self.meta["stored_size"])

    def of(self, split: str) -> Ints:
        """Positions of a part: train, validation or test."""
        return np.flatnonzero(self.split == PARTS.index(split))

    def pixels(self, at: Sequence[int] | Ints) -> Bytes:
        """Copy pictures out of the shards, in the order asked for: [n, S, S, 3] RGB."""
        return self.stored(self.contents[np.asarray(at, np.int64)])

    def stored(self, contents: Ints) -> Bytes:
        """Copy contents out of the shards, used or not: [n, S, S, 3] RGB."""
        return rows(self.shards, contents, int(self.meta["shard_rows"]))

    def original(self, at: int) -> bytes:
        """The file of a picture, untouched.

        Raises:
            DataError: the shard ends before it.
        """
        content, rows = int(self.contents[at]), int(self.meta["shard_rows"])
        begin, end, base = (int(self.offsets[i]) for i in (content, content + 1, content // rows * rows))
        path = self.folder / f"originals-{content // rows:05d}.bin"
        with path.open("rb") as file:
            file.seek(begin - base)
            data = file.read(end - begin)
        if len(data) != end - begin:
            raise DataError(f"{path}: ends before content {content}; run `python -m tasks.ingest` again")
        return data

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Path of each picture's file under the source, [N]."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.folder / "files.parquet", columns=["name", "fate"])
        used = np.isin(table["fate"].to_numpy(), PARTS)
        return tuple(table["name"].filter(used).to_pylist())

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each picture's file, hexadecimal, [N]."""
        return tuple(self.digests[content].tobytes().hex() for content in self.contents)


def shards(data: Path, count: int) -> list[Bytes]:
    """Map the shards of pixels in the folder `data` into memory."""
    return [np.load(data / f"pixels-{number:05d}.npy", mmap_mode="r") for number in range(count)]


def rows(shards: Sequence[Bytes], contents: Ints, shard_rows: int) -> Bytes:
    """Copy contents out of shards of `shard_rows` each: [n, S, S, 3]."""
    numbers, places = np.divmod(contents, shard_rows)
    out = np.empty((len(contents), *shards[0].shape[1:]), np.uint8)
    for number in np.unique(numbers):
        here = np.flatnonzero(numbers == number)
        out[here] = shards[number][places[here]]
    return out


def load(data: Path) -> Images:
    """Map the pictures of the folder `data` into memory.

    Raises:
        DataError: a file is missing, torn, or does not fit the others; names it.
    """
    meta = artifacts.read_json(data / "meta.json")
    try:
        columns = {
            name: np.load(data / f"{name}.npy", mmap_mode="r")
            for name in ("labels", "split", "contents", "offsets", "digests")
        }
        pixels = shards(data, meta["shards"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{data}: torn or incomplete ({error}); run `python -m tasks.ingest` again") from error
    counts = {
        "labels.npy": (len(columns["labels"]), meta["pictures"]),
        "split.npy": (len(columns["split"]), meta["pictures"]),
        "contents.npy": (len(columns["contents"]), meta["pictures"]),
        "digests.npy": (len(columns["digests"]), meta["contents"]),
        "offsets.npy": (len(columns["offsets"]), meta["contents"] + 1),
        "pixels-*.npy": (sum(map(len, pixels)), meta["contents"]),
    }
    for name, (found, told) in counts.items():
        if found != told:
            raise DataError(f"{data}: {name} has {found} rows, not {told}; run `python -m tasks.ingest` again")
    return Images(data, tuple(meta["classes"]), shards=pixels, meta=meta, **columns)
