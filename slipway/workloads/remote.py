"""Sources behind a URL: copied block by block before they are read, so that what is read is on this machine."""

from __future__ import annotations

from pathlib import Path

from slipway.errors import DataError, TransientError
from slipway.progress import Progress

BLOCK = 4 << 20


def copy(url: str, target: Path) -> Path:
    """Copy what is behind a URL of fsspec's to `target`.

    Raises:
        DataError: there is no such file, or it may not or cannot be opened.
        TransientError: its server did not answer.
    """
    import fsspec

    try:
        with (
            fsspec.open(url, "rb") as remote,
            target.open("wb") as local,
            Progress("ingest: copy", getattr(remote, "size", None), "B") as progress,
        ):
            while block := remote.read(BLOCK):
                local.write(block)
                progress.advance(len(block))
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file; set ingest.source") from error
    except (ImportError, ValueError, PermissionError) as error:
        raise DataError(f"{url}: cannot be opened: {error}") from error
    except OSError as error:
        if error.errno is not None and error.filename == str(target):
            raise
        raise TransientError(f"{url}: reading it failed: {error}; try again") from error
    return target
