"""Where pictures come from: a folder of class folders, an archive of one, or the handwritten digits of scikit-learn.

A class is a folder, a picture's label the name of the topmost folder it lies in; `train`, `validation` (`valid`, `val`,
`dev`) and `test` above the classes part the pictures. Hidden files and folders are passed over, links that lead out of
the source are not followed, and an archive is unpacked member by member beside the output: files only, none outside.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from slipway.errors import DataError
from slipway.progress import Progress
from slipway.workloads import remote

EMBEDDED = "embedded"
PARTS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Folders above the classes, and the part that their pictures belong to."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
BLOCK = 1 << 20
HINT = "set ingest.source to a folder of class folders, such as photos/cat/1.jpg or photos/train/cat/1.jpg"


@dataclass(frozen=True)
class Entry:
    """One file that should be a picture."""

    name: str
    """Path under the root."""
    label: str
    part: str | None
    """train, validation or test, as the source says; None where it says nothing."""


@dataclass(frozen=True)
class Source:
    """Files to read."""

    name: str
    """As the user wrote it."""
    root: Path
    entries: list[Entry]
    """Sorted by name."""
    passed_over: dict[str, int]
    """Files that are no part of it, by reason: outside_of_classes, not_a_file (leads out of the source, a device)."""


def find(name: str, work: Path, max_bytes: int) -> Source:
    """List the files of a source; what has to be copied, unpacked or made goes into the folder `work`.

    Members of an archive are unpacked until they are one byte over `max_bytes`, which is enough to refuse them.

    Raises:
        DataError: there is nothing to read.
        TransientError: its server did not answer.
    """
    return _listed(name, _root(name, work, max_bytes))


def pictures(name: str, work: Path, max_bytes: int) -> tuple[Path, list[str]]:
    """List all files of a source, in whatever folders they are: the root, and paths under it, sorted.

    Raises:
        DataError: there is nothing to read.
        TransientError: its server did not answer.
    """
    root = _root(name, work, max_bytes).resolve()
    found = sorted(path.relative_to(root).as_posix() for path in _files(root) if _inside(path, root))
    if not found:
        raise DataError(f"{name}: holds no file")
    return root, found


def _root(name: str, work: Path, max_bytes: int) -> Path:
    if name == EMBEDDED:
        return _digits(work / "digits")
    if "://" in name:
        return _unpack(name, _copy(name, work), work / "unpacked", max_bytes)
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file() and name.lower().endswith(ARCHIVES):
        return _unpack(name, path, work / "unpacked", max_bytes)
    raise DataError(f"{name}: no such folder, and no archive ({', '.join(ARCHIVES)}); {HINT}")


def _listed(name: str, root: Path) -> Source:
    root = _innermost(root.resolve())
    parted = "train" in {PARTS.get(path.name.lower()) for path in _folders(root)}
    entries: list[Entry] = []
    passed_over = {"outside_of_classes": 0, "not_a_file": 0}
    for path in _files(root):
        parts = path.relative_to(root).parts
        part = PARTS.get(parts[0].lower()) if parted else None
        inner = parts[1:] if part else parts
        if len(inner) < 2 or (parted and part is None):
            passed_over["outside_of_classes"] += 1
        elif not _inside(path, root):
            passed_over["not_a_file"] += 1
        else:
            entries.append(Entry("/".join(parts), inner[0], part))
    if not entries:
        raise DataError(f"{name}: no file in a class folder; {HINT}")
    return Source(name, root, sorted(entries, key=lambda entry: entry.name), passed_over)


def _innermost(root: Path) -> Path:
    """Step into a lone folder of folders, as archives often have one: its name is no class."""
    while len(inner := _folders(root)) == 1 and inner[0].name.lower() not in PARTS and _folders(inner[0]):
        root = inner[0]
    return root


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."]


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):  # does not follow links to folders
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        yield from (Path(folder, one) for one in files if not one.startswith("."))


def _inside(path: Path, root: Path) -> bool:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in a ring
        return False
    return target.is_relative_to(root) and stat.S_ISREG(target.stat().st_mode)


def _digits(folder: Path) -> Path:
    """Write scikit-learn's digits (8 × 8, 1,797 of them, UCI's optical recognition set) as PNG files."""  # noqa: RUF002
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.round(values * (255 / 16)))).save(path)
    return folder


def _copy(name: str, work: Path) -> Path:
    """Copy a remote archive into `work`."""
    ending = next((one for one in ARCHIVES if name.split("?")[0].lower().endswith(one)), None)
    if ending is None:
        raise DataError(f"{name}: a URL has to name an archive ({', '.join(ARCHIVES)})")
    return remote.copy(name, work / f"source{ending}")


def _unpack(name: str, path: Path, folder: Path, max_bytes: int) -> Path:
    """Write the plain files of an archive into `folder`; links, devices and names that lead outside are left."""
    folder.mkdir(parents=True)
    members = _zipped(path) if path.suffix.lower() == ".zip" else _tarred(path)
    try:
        with Progress("ingest: unpack", None, "files") as progress:
            for member, stream in members:
                _write(stream, member, folder, max_bytes)
                progress.advance()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(f"{name}: the archive is broken or encrypted ({error}); make it anew") from error
    return folder


def _zipped(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                with archive.open(info) as stream:
                    yield info.filename, stream


def _tarred(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream


def _write(stream: IO[bytes], name: str, folder: Path, max_bytes: int) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/" or any(part.startswith(".") for part in parts):
        return
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        while file.tell() <= max_bytes and (block := stream.read(min(BLOCK, max_bytes + 1 - file.tell()))):
            file.write(block)
