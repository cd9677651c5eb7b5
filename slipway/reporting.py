"""Reports that people read: one self-contained HTML file, figures to pictures, offline and on any screen.

The page loads nothing, runs nothing, follows the reader's light or dark scheme, and is the same bytes for the same
content, so that DVC sees no change where there is none. Its looks stand in reporting.html.j2, beside this file.

    figure, axes = canvas("items", "users")
    axes.bar(...)
    write_html(path, "Validation", "embedded", [Tile("users", "5,012")], [Chapter("Shape", [Plot("Lengths", figure)])])
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slipway import artifacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Verdict = Literal["passed", "warning", "failed", "info"]

PALETTE = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#64748b")
"""Colours that can be told apart on a light and on a dark page."""


@dataclass(frozen=True)
class Tile:
    """One figure at the top of the page."""

    label: str
    value: str
    verdict: Verdict = "info"


@dataclass(frozen=True)
class Table:
    """Rows under a header; numbers are set right-aligned with thousands parted, None as a dash."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Plot:
    """A figure, drawn as SVG; black becomes the colour of the page's text."""

    caption: str
    figure: Figure


@dataclass(frozen=True)
class Note:
    """A sentence with its verdict."""

    text: str
    verdict: Verdict = "info"


@dataclass(frozen=True)
class Thumbnail:
    """Pictures that belong together, side by side over a few words."""

    pictures: Sequence[bytes]
    """JPEG or PNG, small: they become part of the page."""
    text: str
    """A line each."""
    verdict: Verdict = "info"


@dataclass(frozen=True)
class Gallery:
    """A contact sheet."""

    caption: str
    thumbnails: Sequence[Thumbnail]


@dataclass(frozen=True)
class Chapter:
    """A titled part of the page."""

    title: str
    blocks: Sequence[Table | Plot | Note | Gallery]


def metric_title(name: str) -> str:
    """What people call a metric: ndcg_at_10_sampled is NDCG@10 (sampled)."""
    ranked, at, rest = name.partition("_at_")
    if not at:
        return name.replace("_", " ")
    depth, _, kind = rest.partition("_")
    return f"{ranked.upper()}@{depth}{f' ({kind})' if kind else ''}"


def canvas(x_label: str, y_label: str, height: float = 2.4) -> tuple[Figure, Axes]:
    """Make an empty plot in the style of the reports, without pyplot's global state; `height` in inches of 6 across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, height), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.set_prop_cycle(color=PALETTE)
    axes.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", which="both", length=0)
    return figure, axes


def write_html(path: Path, title: str, subtitle: str, tiles: Sequence[Tile], chapters: Sequence[Chapter]) -> None:
    """Replace `path` with a page of `tiles` and `chapters`; every text is escaped."""
    import jinja2

    source = Path(__file__).with_name("reporting.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        cell=_cell, numeric=_numeric, kind=lambda block: type(block).__name__, svg=_svg, uri=_uri
    )
    page = environment.from_string(source).render(title=title, subtitle=subtitle, tiles=tiles, chapters=chapters)
    artifacts.write_text(path, page)


def _numeric(table: Table) -> list[bool]:
    """Which columns of a table hold numbers, and no text."""
    columns = [[row[i] for row in table.rows if row[i] is not None] for i in range(len(table.header))]
    return [bool(column) and all(map(_is_number, column)) for column in columns]


def _is_number(value: object) -> bool:
    return hasattr(value, "__round__") and not isinstance(value, bool)  # NumPy's scalars too


def _cell(value: object) -> str:
    if value is None:
        return "–"  # noqa: RUF001  # the dash of an empty cell
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not _is_number(value):
        return str(value)
    number = float(value)  # type: ignore[arg-type]  # what rounds is a number
    if not math.isfinite(number) or (number and abs(number) < 1e-3):
        return f"{number:.3g}"
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    return f"{number:,.4f}" if abs(number) < 10 else f"{number:,.1f}"


def _uri(picture: bytes) -> str:
    """Make a picture part of the page."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _svg(figure: Figure) -> object:
    """Draw a figure as SVG that scales to its place, follows the page's colours and names no address."""
    import matplotlib as mpl
    from markupsafe import Markup

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "slipway"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawn = stream.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn)  # HTML knows SVG's names by itself
    head, body = drawn.split(">", 1)
    drawn = re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + body
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # the same in every figure, and an id is given once in a page
    return Markup(drawn.replace("#000000", "currentColor"))  # matplotlib has escaped every text in it
