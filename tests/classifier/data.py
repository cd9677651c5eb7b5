"""Small pictures in class folders, and ingested folders of them, for tests that start behind `ingest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slipway import artifacts, config
from slipway.params import Params
from slipway.workloads.classifier import images
from slipway.workloads.classifier.ingest import ingest


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """Blots of colour that no other seed gives: smooth, as photographs are."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, classes: dict[str, int], first: int = 0) -> Path:
    """Write so many JPEGs into the folder of each class, such as cat or train/cat."""
    seed = first
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(seed).save(root / name / f"{number:03d}.jpg", quality=92)
            seed += 1
    return root


def params(source: Path | str, validate: dict[str, Any] | None = None, **images_params: Any) -> Params:
    wanted = {"image_size": 32, **images_params}
    sections = {"workload": "classifier", "ingest": {"source": str(source), "images": wanted}}
    return config.parse({**sections, "validate": validate or {}})


def read(given: Params, out: Path) -> images.Images:
    """Ingest and load what came of it."""
    with artifacts.writing(out) as beside:
        ingest(given, beside, {})
    return images.load(out)


def files(data: images.Images) -> dict[str, dict[str, Any]]:
    """The table of files by name."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(data.folder / "files.parquet").to_pylist()
    return {row["name"]: row for row in rows}
