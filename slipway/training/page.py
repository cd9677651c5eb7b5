"""The page of `train`: how the model learnt, how fast, where the time went, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipway.reporting import PALETTE, Chapter, Note, Plot, Table, Tile, canvas, metric_title, write_html

CLIP = 1.0  # as engine.py clips; importing that would load DeepSpeed
GREY = "#94a3b8"
COLOURS = (*PALETTE, "#ec4899", GREY)
KNOWN = {"loss", "learning_rate", "grad_norm", "loss_scale", "skipped_steps", "mfu", "rss_bytes", "device_bytes"}
MEANINGS = {
    "data": "waiting for batches, and moving them to the device",
    "forward": "the loss of a batch",
    "backward": "its gradient",
    "communication": "collectives, and waiting in them for the other processes",
    "optimizer": "clipping and the update",
    "validation": "the metric at the end of an epoch",
    "checkpoint": "writing checkpoints",
    "other": "the rest: progress, figures, a trace",
}


def write(path: Path, found: Mapping[str, Any], epochs: int) -> None:
    """Write the page.

    Args:
        path: where to.
        found: the values of reports/train.json.
        epochs: how many were asked for.
    """
    best, unit = found["best"], found["unit"]
    tiles = [
        Tile(f"{metric_title(found['metric'])}, validation", f"{best['metric']:.4f}"),
        *(Tile(f"{name}, validation", f"{value:,.4g}") for name, value in best["figures"].items()),
        Tile("best epoch", f"{best['epoch']} of {len(found['curve'])}"),
        Tile("time in training", _clock(found["train_seconds"])),
        Tile(f"{unit} a second", f"{found['samples_per_s']:,.0f}"),
        Tile("model FLOPs utilisation", f"{found['mfu']:.1%}"),
        Tile("waiting for data", f"{found['time_share']['data']:.1%}"),
    ]
    history, curve = found["history"], _curve(found["curve"], metric_title(found["metric"]))
    chapters = [
        Chapter("Learning", [*_ended(found, epochs), curve, *_steps(history)]),
        *_loss_scale(found["loss_scale"], history),
        Chapter("Speed", [_speed(history, unit), _flops(found)]),
        Chapter("Where the time goes", [_bar(found["time_share"]), _parts(found)]),
        Chapter("Memory and traffic", _resources(history)),
        *_techniques(history, unit),
    ]
    write_html(path, "Training", f"{found['workload']}, {found['curve'][-1]['step']:,} steps", tiles, chapters)


def _ended(found: Mapping[str, Any], epochs: int) -> list[Note]:
    done, best = len(found["curve"]), found["best"]["epoch"]
    if done >= epochs:
        return []
    return [Note(f"Training ended after {done} of {epochs} epochs: none after epoch {best} was better.")]


def _curve(curve: Sequence[Mapping[str, Any]], metric: str) -> Plot:
    """Plot the learning curve."""
    epochs = [point["epoch"] for point in curve]
    plot = _pair("epoch", epochs, ("loss", [p["loss"] for p in curve]), (metric, [p["metric"] for p in curve]))
    return Plot("learning curve; the weights of the epoch with the best validation metric are kept", plot)


def _steps(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Loss and gradient by step."""
    from matplotlib.ticker import LogLocator

    steps, loss, rate = [_column(history, name) for name in ("step", "loss", "learning_rate")]
    figure, axes = canvas("step", "norm of the gradient")
    axes.plot(*_series(history, "grad_norm"))
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.axhline(CLIP, color=GREY, linewidth=0.8, linestyle="--")
    return [
        Plot(
            "loss of rank 0, mean since the point before", _pair("step", steps, ("loss", loss), ("learning rate", rate))
        ),
        Plot("norm of the gradient, the largest since the point before; over the line it is clipped", figure),
    ]


def _loss_scale(changes: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> list[Chapter]:
    """Plot every change of fp16's loss scale, and the steps that overflowed; nothing in another precision."""
    if not changes:
        return []
    figure, axes = canvas("step", "loss scale")
    last = {"step": history[-1]["step"] if history else changes[-1]["step"], "scale": changes[-1]["scale"]}
    steps, scales = zip(*[(change["step"], change["scale"]) for change in (*changes, last)], strict=True)
    axes.plot(steps, scales, drawstyle="steps-post")
    axes.set_yscale("log", base=2)
    lost = [change for change in changes if change["overflow"]]
    at, scale = [change["step"] for change in lost], [change["scale"] for change in lost]
    axes.scatter(at, scale, color=PALETTE[3], marker="x", zorder=3, label="overflow: the step was skipped")
    if lost:
        axes.legend(frameon=False)
    skipped = {0: "no step overflowed", 1: "one step overflowed and was skipped"}.get(
        len(lost), f"{len(lost):,} steps overflowed and were skipped"
    )
    return [Chapter("Loss scale", [Plot(f"scale of the loss in fp16; {skipped}", figure)])]


def _speed(history: Sequence[Mapping[str, Any]], unit: str) -> Plot:
    speed, mfu = _column(history, f"{unit}_per_s"), [100 * value for value in _column(history, "mfu")]
    pair = _pair("step", _column(history, "step"), (f"{unit}/s", speed), ("MFU (%)", mfu), zero=True)
    return Plot("speed of all processes, and model FLOPs utilisation, without validation and checkpoints", pair)


def _flops(found: Mapping[str, Any]) -> Table:
    rows = [
        ("operations of a step, one process (GFLOP)", found["flops_per_step"] / 1e9),
        ("measured peak, one process (GFLOP/s)", found["peak_flops_per_s"] / 1e9),
    ]
    return Table("model FLOPs utilisation is what the model needs over what a matrix product gets", ("", "value"), rows)


def _bar(shares: Mapping[str, float]) -> Plot:
    figure, axes = canvas("share of the time in training (%)", "", height=1.5)
    left = 0.0
    for (name, share), colour in zip(shares.items(), COLOURS, strict=True):
        axes.barh([""], [100 * share], left=left, color=colour, label=name)
        if share > 0.06:
            axes.text(left + 50 * share, 0, f"{share:.0%}", ha="center", va="center", color="white", fontsize=9)
        left += 100 * share
    axes.set_xlim(0, 100)
    axes.grid(visible=False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return Plot("the whole run, on rank 0", figure)


def _parts(found: Mapping[str, Any]) -> Table:
    rows = [
        (name, f"{share:.1%}", found["train_seconds"] * share, MEANINGS[name])
        for name, share in found["time_share"].items()
    ]
    return Table("parts of training", ("part", "share", "seconds", "what it is"), rows)


def _resources(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    figure, axes = canvas("step", "GB")
    for name, label in (("rss_bytes", "process"), ("device_bytes", "accelerator, the most so far")):
        steps, values = _series(history, name)
        if values:
            axes.plot(steps, [value / 1e9 for value in values], label=label)
    axes.set_ylim(bottom=0)
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    steps, sent = _series(history, "sent_bytes_per_step")
    unit, size = ("MB", 1e6) if max(sent, default=0) >= 1e6 else ("kB", 1e3)
    traffic, below = canvas("step", f"{unit} a step")
    below.plot(steps, [value / size for value in sent], color=PALETTE[2])
    below.set_ylim(bottom=0)
    return [Plot("memory of rank 0", figure), Plot("bytes that rank 0 sent to other processes", traffic)]


def _techniques(history: Sequence[Mapping[str, Any]], unit: str) -> list[Chapter]:
    """Plot whatever else was told while the model trained, such as the number of a loader's workers."""
    shown = KNOWN | {"step", "at_ms", "seconds", "sent_bytes_per_step", f"{unit}_per_s"}
    shown |= {f"{name}_share" for name in MEANINGS}
    names = list(dict.fromkeys(name for sample in history for name in sample if name not in shown))
    plots = []
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        figure, axes = canvas("step", name.replace("_", " "), height=1.8)
        axes.plot(*_series(history, name), color=colour, drawstyle="steps-post")
        axes.set_ylim(bottom=min(0, *axes.get_ylim()))
        plots.append(Plot(name.replace("_", " "), figure))
    return [Chapter("Techniques", plots)] if plots else []


def _pair(
    label: str,
    x: Sequence[float],
    left: tuple[str, Sequence[float]],
    right: tuple[str, Sequence[float]],
    zero: bool = False,
) -> Any:
    """Draw two lines over one axis, each with its own scale; `zero`: both begin at 0."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(label, left[0])
    mark = "o" if len(x) < 30 else ""
    (one,) = axes.plot(x, left[1], marker=mark, markersize=3)
    beside = axes.twinx()
    beside.spines[["top", "right", "left", "bottom"]].set_visible(False)
    beside.tick_params(axis="y", which="both", length=0)
    beside.set_ylabel(right[0])
    (two,) = beside.plot(x, right[1], color=PALETTE[1], marker=mark, markersize=3)
    if zero:
        axes.set_ylim(bottom=0)
        beside.set_ylim(bottom=0)
    axes.legend(
        [one, two],
        [f"{left[0]} (left)", f"{right[0]} (right)"],
        frameon=False,
        ncols=2,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the samples that have `name`."""
    having = [sample for sample in history if name in sample]
    return [sample["step"] for sample in having], [sample[name] for sample in having]


def _column(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Values of all samples; not a number where one has none."""
    return [sample.get(name, float("nan")) for sample in history]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{seconds:.1f} s"
