"""What `validate` sees of the classifier's data: figures, frames, plots. Limits: expectations.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slipway.reporting import PALETTE, Chapter, Note, Plot, Table, canvas
from slipway.validation import MAX_ROWS, Frame, Subject
from slipway.workloads.classifier import sheet, table
from slipway.workloads.classifier.images import PARTS, Images
from slipway.workloads.classifier.parting import FATES
from slipway.workloads.classifier.table import Files

if TYPE_CHECKING:
    import pandas as pd

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LEFT_OUT = tuple(fate for fate in FATES if fate not in PARTS)
FLOOR = 1e-4
"""Least share in a bin of the stability index, where the logarithm of an empty one would be infinite."""


def examine(folder: Path, before: Mapping[str, Any] | None) -> Subject:
    """Look at the pictures of `folder`; `before` is the profile of the last accepted version of their source."""
    files = table.read(folder)
    meta = files.data.meta
    dropped, total = meta["dropped"], meta["files"]
    trained = meta["by_class"]["train"]
    held_out = sum(meta["parts"][part] for part in PARTS[1:])
    figures = {
        "files": total,
        "pictures": meta["pictures"],
        "classes": len(files.data.classes),
        "unusable_ratio": dropped["fault"] / total,
        "duplicate_ratio": dropped["duplicate"] / total,
        "conflicts": dropped["conflict"],
        "near_conflicts": int((files.label[files.ends[0]] != files.label[files.ends[1]]).sum()),
        "near_ratio": _alike(files) / max(1, meta["pictures"]),
        "leak_ratio": len(_held_out_ends(files)) / max(1, held_out),
        "imbalance": max(trained) / max(1, min(trained)),
        "volume_ratio": None if before is None else meta["pictures"] / before["pictures"],
        "psi": None if before is None else float(stability(_shares(files.data), before["classes"])[3].sum()),
    }
    frames = {
        "classes": Frame(lambda: [_classes(files.data)], ("class",)),
        "held out": Frame(lambda: _held_out(files), ("name", "part", "class")),
    }
    profile = {"pictures": meta["pictures"], "classes": _shares(files.data)}
    suite, headline = Path(__file__).with_name("expectations.json"), ("files", "pictures", "classes")
    return Subject(suite, frames, figures, _rejects(files), profile, headline)


def _alike(files: Files) -> int:
    """Pictures that look like another one of their part."""
    a, b = files.ends
    same = files.fate[a] == files.fate[b]
    return len(np.union1d(a[same], b[same]))


def _held_out_ends(files: Files) -> Ints:
    """Held-out files that a training picture nearly repeats, or would have, had it not been left out."""
    ends = np.concatenate([end[files.leaking] for end in files.ends])
    return np.unique(ends[np.isin(files.fate[ends], PARTS[1:])])


def _shares(data: Images) -> dict[str, int]:
    counts = np.bincount(data.labels, minlength=len(data.classes)).tolist()
    return dict(zip(data.classes, counts, strict=True))


def _classes(data: Images) -> pd.DataFrame:
    import pandas as pd

    columns = data.meta["by_class"]
    frame = pd.DataFrame({"class": data.classes, **columns})
    frame["held_out"] = frame["validation"] + frame["test"]
    return frame


def _held_out(files: Files) -> Iterator[pd.DataFrame]:
    """Pictures that are not trained on, and how many near duplicates of each are."""
    import pandas as pd

    twins = np.zeros(len(files.fate), np.int64)
    for one, other in (files.ends, files.ends[::-1]):
        np.add.at(twins, one, files.fate[other] == "train")
    held = np.flatnonzero(np.isin(files.fate, PARTS[1:]))
    names = files.table["name"].take(held).to_pylist()
    yield pd.DataFrame(
        {"name": names, "part": files.fate[held], "class": files.label[held], "twins_in_train": twins[held]}
    )


def _rejects(files: Files) -> dict[str, list[dict[str, Any]]]:
    """Files that were left out, by reason; the first of each."""
    found = {}
    for fate in LEFT_OUT:
        rows = files.table.take(np.flatnonzero(files.fate == fate)[:MAX_ROWS]).to_pylist()
        if fate == "fault":
            found[fate] = [{"name": row["name"], "fault": row["fault"], "detail": row["detail"]} for row in rows]
        elif fate == "conflict":
            found[fate] = [{"name": row["name"], "sha256": row["sha256"][:12]} for row in rows]
        else:
            twins = files.table["name"].take(np.array([row["twin"] for row in rows], np.int64)).to_pylist()
            found[fate] = [{"name": row["name"], "of": twin} for row, twin in zip(rows, twins, strict=True)]
    return {reason: rows for reason, rows in found.items() if rows}


def stability(now: Mapping[str, int], before: Mapping[str, int]) -> tuple[list[str], Floats, Floats, Floats]:
    """Population stability index of the classes, class by class; the index is the sum of the parts.

    Returns: classes of either version, and of each the share before, the share now, and its part of the index.
    """
    names = sorted({*now, *before})
    then, present = (np.array([counts.get(name, 0) for name in names], np.float64) for counts in (before, now))
    then, present = then / max(then.sum(), 1), present / max(present.sum(), 1)
    p, q = np.maximum(present, FLOOR), np.maximum(then, FLOOR)
    return names, then, present, (p - q) * np.log(p / q)


def chapters(folder: Path, before: Mapping[str, Any] | None) -> list[Chapter]:
    """Show the pictures of `folder`: what was refused or is suspect, all of them, and against the last version."""
    files = table.read(folder)
    return [
        Chapter("Contact sheet: what was refused or is suspect", sheet.suspects(files)),
        Chapter("What the data look like", [_balance(files.data), sheet.samples(files), _sides(files)]),
        Chapter("The files", [_fates(files), _formats(files), _unusual(files.data)]),
        Chapter("Against the last accepted version", _drift(files.data, before)),
    ]


def _balance(data: Images) -> Plot:
    order = np.argsort(data.meta["by_class"]["train"], kind="stable")[-40:]
    figure, axes = canvas("pictures", "", height=0.9 + 0.24 * len(order))
    left = np.zeros(len(order))
    for part, colour in zip(PARTS, (PALETTE[0], PALETTE[1], PALETTE[2]), strict=True):
        counts = np.array(data.meta["by_class"][part], np.float64)[order]
        axes.barh([data.classes[at] for at in order], counts, left=left, label=part, color=colour)
        left += counts
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#808080", alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(PARTS))
    parts = ", ".join(f"{count:,} {part}" for part, count in data.meta["parts"].items())
    most = "" if len(order) == len(data.classes) else f"; the largest 40 of {len(data.classes):,}"
    return Plot(f"How the pictures fall to the classes: {parts}{most}", figure)


def _sides(files: Files) -> Plot:
    width, height = (files.table[name].drop_null().to_numpy() for name in ("width", "height"))
    shorter = np.minimum(width, height)
    figure, axes = canvas("shorter side, px", "pictures")
    axes.hist(shorter, bins=50, range=(0, 1.05 * float(shorter.max())))
    size = files.data.image_size
    axes.axvline(size, color=PALETTE[3], linewidth=1)
    small = int((shorter < size).sum())
    return Plot(
        f"How large the pictures are: {small:,} are smaller than the {size} px that the model sees (line)", figure
    )


def _fates(files: Files) -> Table:
    sizes = files.table["bytes"].to_numpy()
    rows = []
    for fate in FATES:
        here = files.fate == fate
        rows.append((fate, int(here.sum()), sizes[here].sum() / 1e6))
    about = {"outside_of_classes": "outside of class folders", "not_a_file": "link out of the source, or no file"}
    rows += [(f"passed over: {about[name]}", count, None) for name, count in files.data.meta["passed_over"].items()]
    return Table("What became of the files", ("fate", "files", "MB"), rows)


def _formats(files: Files) -> Table:
    counted = files.table["format"].drop_null().value_counts().to_pylist()
    rows = sorted(((row["values"], row["counts"]) for row in counted), key=lambda row: -row[1])
    return Table("What the pictures are, whatever their names say", ("format", "files"), rows)


def _unusual(data: Images) -> Table:
    about = {
        "wrong_extension": "is another format than its name says: read as what it is",
        "cmyk": "four inks: converted to RGB",
        "grey": "one channel: three alike",
        "palette": "a table of colours: looked up",
        "alpha": "transparent: laid over white",
        "deep": "more than 8 bits a channel: reduced to 8",
        "animated": "the first picture is taken",
        "rotated": "by EXIF: turned upright",
    }
    faults = [(f"fault: {name}", count, "left out") for name, count in data.meta["faults"].items()]
    notes = [(name, count, about[name]) for name, count in data.meta["notes"].items()]
    return Table("Faults, and what is unusual", ("what", "files", "what was done"), [*faults, *notes])


def _drift(data: Images, before: Mapping[str, Any] | None) -> list[Note | Plot | Table]:
    if before is None:
        return [Note("No version of this source was accepted before: there is nothing to compare with.", "info")]
    names, then, now, parts = stability(_shares(data), before["classes"])
    widest = np.argsort(parts)[::-1][:10]
    rows = [(names[at], float(then[at]), float(now[at]), float(parts[at])) for at in widest]
    return [
        Note(f"{len(data):,} pictures now, {before['pictures']:,} before; stability index {parts.sum():.3f}."),
        Table("The classes that moved most", ("class", "share before", "share now", "part of the index"), rows),
    ]
