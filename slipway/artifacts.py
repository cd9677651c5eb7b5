"""Files that are either whole or absent: write beside, then rename; and the checksums that prove it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipway.errors import DataError, SlipwayError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the place of `path` in one rename.

    The temporary path may be made a file or a folder. On any error it is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield beside
        if beside.is_dir():
            # A folder cannot be renamed over a full one: the old one steps aside first.
            old = beside.with_suffix(".old")
            if path.exists():
                path.rename(old)
            beside.rename(path)
            _remove(old)
        else:
            with beside.open("rb") as written:
                os.fsync(written.fileno())
            beside.replace(path)
    finally:
        _remove(beside)


def _sweep(path: Path) -> None:
    """Remove what writers of `path` that were killed left beside it; put back a folder whose swap was cut off."""
    for left in path.parent.glob(f".{path.name}.*"):
        if left.suffix not in {".tmp", ".old"} or _alive(left.name.removeprefix(f".{path.name}.").split(".")[0]):
            continue
        if left.suffix == ".old" and not path.exists():
            left.rename(path)
        else:
            _remove(left)


def _alive(pid: str) -> bool:
    return pid.isdigit() and int(pid) != os.getpid() and Path(f"/proc/{pid}").exists()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` with `data` atomically."""
    with writing(path) as beside:
        beside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8) atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, without importing NumPy here
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run the stage that writes it first") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def sha256(path: Path) -> str:
    """Hash a file, or a folder's relative names and contents in sorted order; hexadecimal."""
    digest = hashlib.sha256()
    if not path.exists():
        raise SlipwayError(f"{path}: no such file or folder")
    for part in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if part != path:
            digest.update(f"{part.relative_to(path)}\0{part.stat().st_size}\0".encode())
        with part.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
