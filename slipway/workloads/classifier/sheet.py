"""The contact sheet of the page of `validate`: what was refused or is suspect, and a few pictures of each class.

Near duplicates stand side by side with their parts and classes, so that a look tells which is right.
"""

# P pairs
from __future__ import annotations

import io
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slipway.reporting import Gallery, Note, Thumbnail, Verdict
from slipway.workloads.classifier.images import PARTS
from slipway.workloads.classifier.table import Files

Ints = npt.NDArray[np.int64]

HEIGHT = 120
"""Of a thumbnail, in pixels; shown smaller, for displays with more pixels to the inch."""
MOST = 24
"""Thumbnails of one gallery."""
CLASSES = 12
"""Classes that are shown by samples."""


def suspects(files: Files) -> list[Gallery | Note]:
    """Show what was refused, what leaks, what looks alike, and what is unusual; a note where there is nothing."""
    alike = ~files.leaking
    labels = [files.label[end] for end in files.ends]
    torn = labels[0] != labels[1]
    found = [
        _refused(files),
        _conflicts(files),
        _pairs(files, files.leaking, "To train on and held out, and nearly the same", "warning"),
        _pairs(files, alike & torn, "Nearly the same, in two classes: one label is wrong", "warning"),
        _pairs(files, alike & ~torn, "Nearly the same, in one class", "info"),
        _unusual(files),
    ]
    shown = [gallery for gallery in found if gallery.thumbnails]
    return [*shown] or [Note("Nothing was refused, and no two pictures look alike.", "passed")]


def samples(files: Files) -> Gallery:
    """Two training pictures of each class."""
    data, thumbnails = files.data, []
    for label in np.linspace(0, len(data.classes) - 1, min(CLASSES, len(data.classes))).round().astype(int):
        here = np.flatnonzero((data.labels == label) & (data.split == 0))
        chosen = here[np.linspace(0, len(here) - 1, min(2, len(here))).astype(int)] if len(here) else here
        if len(chosen):
            rows = files.table.take(np.flatnonzero(np.isin(files.fate, PARTS))[chosen]).to_pylist()
            thumbnails.append(Thumbnail([_thumb(files, row) for row in rows], data.classes[label]))
    return Gallery("Two training pictures of a class, as the model gets them but for the squashing", thumbnails)


def _refused(files: Files) -> Gallery:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(files.data.folder / "refused.parquet").to_pylist()
    total = files.data.meta["dropped"]["fault"]
    thumbnails = [
        Thumbnail(
            [row["thumb"]] if row["thumb"] else [_blank(row["fault"])], f"{row['name']}\n{row['fault']}", "failed"
        )
        for row in rows[:MOST]
    ]
    return Gallery(_counted("Refused: no usable picture", len(thumbnails), total), thumbnails)


def _conflicts(files: Files) -> Gallery:
    rows = files.table.take(np.flatnonzero(files.fate == "conflict")).to_pylist()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["sha256"], []).append(row)
    thumbnails = [
        Thumbnail([_thumb(files, group[0])], "\n".join(row["name"] for row in group), "warning")
        for group in list(groups.values())[:MOST]
    ]
    return Gallery(_counted("One file in two classes: left out", len(thumbnails), len(groups)), thumbnails)


def _pairs(files: Files, chosen: npt.NDArray[np.bool_], caption: str, verdict: Verdict) -> Gallery:
    """Pairs side by side, the most alike first."""
    places = np.flatnonzero(chosen)
    correlation = files.pairs["correlation"].to_numpy()
    places = places[np.argsort(-correlation[places], kind="stable")]
    thumbnails = []
    for place in places[:MOST].tolist():
        rows = files.table.take([int(end[place]) for end in files.ends]).to_pylist()
        lines = [f"{_said(row)}: {row['class']}, {_short(row['name'])}" for row in rows]
        pictures = [_thumb(files, row) for row in rows]
        thumbnails.append(Thumbnail(pictures, "\n".join([*lines, f"alike by {correlation[place]:.3f}"]), verdict))
    return Gallery(_counted(caption, len(thumbnails), len(places)), thumbnails)


def _short(name: str) -> str:
    """The last part of a path, its middle left out where it is long."""
    path = PurePosixPath(name)
    return path.name if len(path.name) <= 20 else f"{path.stem[:10]}…{path.stem[-3:]}{path.suffix[:8]}"


def _said(row: dict[str, Any]) -> str:
    return "left out of train" if row["fate"] == "leak" else str(row["fate"])


def _unusual(files: Files) -> Gallery:
    """A few pictures of each kind that is unusual but used; where nearly all are of a kind, it is not."""
    thumbnails = []
    said = files.table["notes"].to_pylist()
    for note, count in files.data.meta["notes"].items():
        if 0 < count < files.data.meta["files"] / 2:
            rows = files.table.take(
                np.array([at for at, notes in enumerate(said) if note in notes.split()][:3])
            ).to_pylist()
            text = note.replace("_", " ")
            thumbnails += [Thumbnail([_thumb(files, row)], f"{text}\n{row['name']}") for row in rows]
    return Gallery("Unusual, and read all the same", thumbnails[:MOST])


def _counted(caption: str, shown: int, total: int) -> str:
    return f"{caption} ({total:,}{'' if shown == total else f'; {shown} are shown'})"


def _thumb(files: Files, row: dict[str, Any]) -> bytes:
    """A content that was read, in its own proportions."""
    pixels = files.data.stored(np.array([row["content"]]))[0]
    width = min(3 * HEIGHT, max(HEIGHT // 3, round(HEIGHT * row["width"] / row["height"])))
    return _jpeg(Image.fromarray(pixels).resize((width, HEIGHT), Image.Resampling.BICUBIC))


def _blank(fault: str) -> bytes:
    """Stand for a file of which nothing can be seen."""
    from PIL import ImageDraw

    image = Image.new("RGB", (HEIGHT, HEIGHT), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    draw.line((20, 20, HEIGHT - 20, HEIGHT - 20), (200, 200, 200), 2)
    draw.line((20, HEIGHT - 20, HEIGHT - 20, 20), (200, 200, 200), 2)
    return _jpeg(image)


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
