"""The page of `compress`: every variant with what it costs and what it loses, the Pareto plot, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway.reporting import PALETTE, Chapter, Note, Plot, Table, Tile, canvas, metric_title, write_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEGA = 1e6


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write the page from the values of reports/compress.json."""
    variants: dict[str, Any] = found["variants"]
    chosen, full = variants[found["choice"]["recipe"]], variants["fp32"]
    tiles = [
        Tile("served", f"{found['choice']['recipe']} in {chosen['engine']}"),
        Tile("size", f"{chosen['size_bytes'] / full['size_bytes']:.0%} of FP32"),
        Tile("latency", ", ".join(f"{ms:.2f} ms" for ms in chosen["latency_ms"].values())),
        Tile(metric_title(found["metric"]), f"{chosen['metric']:.4f}"),
    ]
    chapters = [
        Chapter("Choice", [Note(found["choice"]["reason"]), _choice(found)]),
        Chapter("Pareto front", [Plot("metric against latency at batch 1; the larger, the larger", pareto(found))]),
        Chapter("Variants", [_costs(found), _engines(found)]),
        Chapter("What is lost, and where", _losses(found)),
    ]
    write_html(path, "Compression", f"{found['workload']}, {found['samples']:,} validation samples", tiles, chapters)


def _choice(found: Mapping[str, Any]) -> Table:
    refused = found["choice"]["refused"]
    rows = [
        (name, "served" if name == found["choice"]["recipe"] else refused.get(name, "")) for name in found["variants"]
    ]
    return Table("what became of each recipe", ("recipe", "verdict"), rows + list(found["left_out"].items()))


def _costs(found: Mapping[str, Any]) -> Table:
    batches = list(next(iter(found["variants"].values()))["latency_ms"])
    header = [
        "recipe",
        "engine",
        metric_title(found["metric"]),
        *(f"ms, batch {batch}" for batch in batches),
        *(f"gain, batch {batch}" for batch in batches),
        "size (MB)",
        "peak memory (MB)",
        "of it the model (MB)",
        "overlap@10",
        "front",
    ]
    rows = [
        (
            name,
            each["engine"],
            each["metric"],
            *each["latency_ms"].values(),
            *each["speedup"].values(),
            round(each["size_bytes"] / MEGA, 2),
            round(each["peak_bytes"] / MEGA, 1),
            round(each["added_bytes"] / MEGA, 1),
            (each["quality"] or {}).get("overlap"),
            name in found["front"],
        )
        for name, each in found["variants"].items()
    ]
    return Table("gain: over FP32 in its fastest engine; one thread, medians, taken in turn", header, rows)


def _engines(found: Mapping[str, Any]) -> Table:
    batches = list(next(iter(found["variants"].values()))["latency_ms"])
    rows = [(form["recipe"], form["engine"], *form["latency_ms"].values()) for form in found["forms"]]
    return Table(
        "every recipe in every engine", ("recipe", "engine", *(f"ms, batch {batch}" for batch in batches)), rows
    )


def _losses(found: Mapping[str, Any]) -> list[Table | Plot | Note]:
    blocks: list[Table | Plot | Note] = []
    for name, each in found["variants"].items():
        if each["quality"] is not None:
            blocks.append(
                Plot(f"{name}: relative loss, with its bounds; the line is compress.max_drop", losses(found, name))
            )
            blocks.append(_slices(name, each["quality"]))
    note = (
        "A slice fails only where it is shown to lose more than compress.max_drop; open: its samples are too few to "
        "show the one or the other. Overall a smaller loss has to be shown."
    )
    return [Note(note), *blocks] if blocks else [Note("nothing was compared with FP32")]


def _slices(name: str, quality: Mapping[str, Any]) -> Table:
    rows = [
        (part, each["count"], each["value"], each["low"], each["high"], each["verdict"])
        for part, each in {"all": quality["overall"], **quality["slices"]}.items()
    ]
    return Table(name, ("part", "samples", "relative loss", "at least", "at most", "verdict"), rows)


def pareto(found: Mapping[str, Any], highlighted: str = "") -> Figure:
    """Plot metric against latency at the first batch size, a marker a variant, its area the size; the front joined."""
    variants: dict[str, Any] = found["variants"]
    figure, axes = canvas("latency (ms)", metric_title(found["metric"]), height=3.2)
    largest = max(each["size_bytes"] for each in variants.values())
    served = found["choice"]["recipe"]
    points = [(_first(each["latency_ms"]), each["metric"]) for each in variants.values()]
    for number, (name, each) in enumerate(variants.items()):
        colour = PALETTE[2] if name == served else PALETTE[0] if name in found["front"] else PALETTE[5]
        edge = PALETTE[3] if name == highlighted else "none"
        at = points[number]
        area = 30 + 220 * each["size_bytes"] / largest
        axes.scatter(*at, s=area, color=colour, alpha=0.75, edgecolors=edge, linewidths=2)
        under = -14 if _crowded(at, points[:number], points) else 6
        axes.annotate(f"{name}, {each['engine']}", at, xytext=(8, under), textcoords="offset points", fontsize=8)
    _frontier(axes, points)
    axes.margins(0.15, 0.2)
    axes.set_xlim(left=0)
    return figure


def _first(latency: Mapping[Any, float]) -> float:
    return next(iter(latency.values()))


def _crowded(at: tuple[float, float], labelled: Sequence[tuple[float, float]], points: Sequence[Any]) -> bool:
    """Whether the label of a point that has one already is in the way."""
    spans = [max(values) - min(values) for values in zip(*points, strict=True)]
    return any(
        all(abs(a - b) <= 0.05 * span for a, b, span in zip(at, other, spans, strict=True)) for other in labelled
    )


def _frontier(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Join the points that none is faster and better than."""
    kept = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
    axes.step(*zip(*sorted(kept), strict=True), where="post", color="#808080", linewidth=0.8, linestyle="--")


def losses(found: Mapping[str, Any], name: str) -> Figure:
    """Plot the relative loss of a variant, overall and by slice, with its bounds."""
    quality = found["variants"][name]["quality"]
    parts = {"all": quality["overall"], **quality["slices"]}
    figure, axes = canvas("relative loss of the metric", "", height=0.6 + 0.3 * len(parts))
    colours = {"kept": PALETTE[2], "open": PALETTE[5], "lost": PALETTE[3]}
    for row, each in enumerate(parts.values()):
        low, high = each["low"], each["high"]
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color=colours[each["verdict"]], linewidth=2)
        axes.plot([each["value"]], [row], "o", color=colours[each["verdict"]], markersize=5)
    axes.axvline(found["max_drop"], color="#808080", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    widest = 4 * max(found["max_drop"], *(abs(each["value"]) for each in parts.values()), 0.01)
    axes.set_xlim(max(-widest, axes.get_xlim()[0]), min(widest, axes.get_xlim()[1]))
    return figure


def plots(folder: Path, found: Mapping[str, Any]) -> None:
    """Write two plots of each variant into `folder`, for its run in MLflow: where it stands, and where it loses."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in found["variants"].items():
        pareto(found, name).savefig(folder / f"{name}.pareto.png", dpi=110, metadata={"Software": None})
        if each["quality"] is not None:
            losses(found, name).savefig(folder / f"{name}.losses.png", dpi=110, metadata={"Software": None})
