"""Where texts come from: a file, a folder of files, or the Python library's own source, document by document.

A file is a document; a longer one is cut at ends of lines into pieces, so that one large file, too, gives documents to
train on and to hold out, and memory stays bounded. The order is that of the sorted paths.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from slipway.errors import DataError

EMBEDDED = "embedded"
PIECE = 16 << 10
"""Bytes after which a document ends at the next line."""
LONGEST = 64 << 10
"""Bytes after which a line is cut, at the end of a character."""
UNWANTED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the library that are not everywhere installed, or not its own."""


@dataclass(frozen=True)
class Document:
    """Bytes that should be a text."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """Files to read."""

    name: str
    """As the user wrote it."""
    folder: Path
    files: list[Path]
    """Sorted."""
    size_bytes: int

    def documents(self) -> Iterator[Document]:
        """Read every file, from the first, each time it is called."""
        for path in self.files:
            name = path.relative_to(self.folder).as_posix()
            try:
                with path.open("rb") as stream:
                    for number, piece in enumerate(_pieces(stream)):
                        yield Document(f"{name}#{number}" if number else name, piece)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error}") from error


def find(name: str) -> Source:
    """List the files of a source.

    Raises:
        DataError: there is nothing to read.
    """
    if name == EMBEDDED:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = (p for p in folder.rglob("*.py") if not UNWANTED & {*p.relative_to(folder).parts})
        return _source(name, folder, [p for p in files if p.stat().st_size])
    path = Path(name)
    if path.is_dir():
        files = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return _source(name, path, [p for p in files if p.is_file()])
    if not path.is_file():
        raise DataError(f"{name}: no such file or folder; set ingest.source to a text file or a folder of them")
    return _source(name, path.parent, [path])


def _source(name: str, folder: Path, files: list[Path]) -> Source:
    size = sum(path.stat().st_size for path in files)
    if not size:
        raise DataError(f"{name}: holds no text; set ingest.source to a text file or a folder of them")
    return Source(name, folder, sorted(files, key=lambda path: path.relative_to(folder).as_posix()), size)


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    yield _piece(stream)  # an empty file is an empty document
    while piece := _piece(stream):
        yield piece


def _piece(stream: BinaryIO) -> bytes:
    piece = stream.read(PIECE)
    if len(piece) == PIECE and not piece.endswith(b"\n"):
        piece += stream.readline(LONGEST - PIECE)
        # A line that is longer is cut; the bytes that belong to its last character still come along.
        while len(piece) >= LONGEST and not piece.endswith(b"\n") and (following := stream.read(1)):
            if following[0] & 0xC0 != 0x80 or len(piece) > LONGEST + 3:
                stream.seek(-1, 1)
                break
            piece += following
    return piece
