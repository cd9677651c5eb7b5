"""A folder or archive of pictures as requests: for every file the likeliest classes, whatever folder it lies in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slipway import artifacts
from slipway.errors import PictureError
from slipway.params import Params
from slipway.workloads.base import Query, Requests
from slipway.workloads.classifier import sources
from slipway.workloads.classifier.augmentation import view
from slipway.workloads.classifier.decoding import Limits, decode
from slipway.workloads.classifier.schema import ABOUT, MIN_SIDE

BATCH = 64  # pictures that are decoded ahead


def requests(params: Params, package: Path, work: Path, k: int) -> Requests:
    """List `params.ingest.source`; an archive is unpacked into `work`, each time.

    Raises:
        DataError: there is nothing to read.
        TransientError: its server did not answer.
    """
    images, about = params.ingest.images, artifacts.read_json(package / ABOUT)
    limits = Limits(round(images.max_mb * 1e6), round(images.max_megapixels * 1e6), MIN_SIDE)
    shutil.rmtree(work / "source", ignore_errors=True)
    (work / "source").mkdir(parents=True)
    root, names = sources.pictures(params.ingest.source, work / "source", limits.max_bytes)

    def query(name: str) -> tuple[str, Query | None]:
        try:
            pixels = decode((root / name).read_bytes(), about["stored_size"], limits).pixels
        except (PictureError, OSError):
            return name, None
        return name, Query({"image": view(pixels, about["image_size"])}, {"k": k})

    def read(start: int) -> Iterator[tuple[str, Query | None]]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for at in range(start, len(names), BATCH):
                yield from threads.map(query, names[at : at + BATCH])

    return Requests("picture", "classes", {"class": "string", "probability": "float64"}, len(names), read)
