"""How fast JPEGs become squares of RGB: the classifier's decoder beside Pillow and OpenCV, on one core and on two.

    python -m benchmarks.decoding FOLDER [--json benchmarks/results/decoding.json] [--side 180]

FOLDER holds JPEGs, at any depth. Every route does the whole way from the bytes of a file in memory to [side, side, 3],
in turns of the same rounds; the median is told. Rates are by the processor time of the decoding processes, so that what
else the machine does counts little. The limit of two cores is twice what one does alone: what is missing, they lose to
one another, as over memory.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim, tell
from slipway.workloads.classifier import decoding
from slipway.workloads.classifier.decoding import Limits

Pixels = npt.NDArray[np.uint8]
BILINEAR = Image.Resampling.BILINEAR
LIMITS = Limits(max_bytes=32_000_000, max_pixels=64_000_000, min_side=8)
OURS, BASELINE = "slipway", "Pillow"


def pillow(data: bytes, side: int) -> Pixels:
    """Every pixel is decoded."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), BILINEAR))


def pillow_draft(data: bytes, side: int) -> Pixels:
    """The decoder reduces by 2, 4 or 8."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (side, side))
    return np.asarray(image.convert("RGB").resize((side, side), BILINEAR))


def opencv(data: bytes, side: int) -> Pixels:
    """Every pixel is decoded."""
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return np.asarray(cv2.resize(decoded, (side, side), interpolation=cv2.INTER_AREA))


def opencv_reduced(data: bytes, side: int) -> Pixels:
    """The decoder reduces by 2, 4 or 8, if enough is left; OpenCV itself does not look."""
    shorter = min(Image.open(io.BytesIO(data)).size)
    factor = next((by for by in (8, 4, 2) if shorter // by >= side), 1)
    flag = cv2.IMREAD_COLOR if factor == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}")
    decoded = cv2.resize(cv2.imdecode(np.frombuffer(data, np.uint8), flag), (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def slipway(data: bytes, side: int) -> Pixels:
    """With all checks of the header, and a fault where the file is cut."""
    return decoding.decode(data, side, LIMITS).pixels


ROUTES: dict[str, Callable[[bytes, int], Pixels]] = {
    BASELINE: pillow,
    "Pillow, draft": pillow_draft,
    "OpenCV": opencv,
    "OpenCV, reduced": opencv_reduced,
    OURS: slipway,
}
PICTURES: list[bytes] = []
"""What a measuring process decodes, read once when it starts."""


@dataclass
class Rates:
    """Images/s of one route, a figure a round."""

    one: list[float] = field(default_factory=list)
    two: list[float] = field(default_factory=list)
    difference: float = 0.0
    """Mean difference from Pillow's pixels, of 255."""

    def medians(self) -> tuple[float, float]:
        """On one core, on two."""
        return statistics.median(self.one), statistics.median(self.two)


def main() -> None:
    """Measure every route and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--side", type=int, default=180, help="side of the square, px")
    parser.add_argument("--images", type=int, default=300, help="files that are drawn from the folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of processor time, for one measurement")
    options = parser.parse_args()
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error(f"{options.folder}: no JPEG in it")
    chosen = random.Random(0).sample(paths, min(options.images, len(paths)))
    rates = measure(chosen, options.side, options.rounds, options.seconds)
    show(rates, options.side)
    command = f"python -m benchmarks.decoding {options.folder.name} --side {options.side}"
    tell(f"Decoding {len(chosen)} JPEGs", command, claims(rates), options.json)


def measure(paths: Sequence[Path], side: int, rounds: int, seconds: float) -> dict[str, Rates]:
    """Let every route decode for some seconds, on one core, then on two, round after round."""
    rates = {name: Rates() for name in ROUTES}
    with ProcessPoolExecutor(2, get_context("spawn"), _load, (paths,)) as pool:
        for name in rates:  # warms both processes as well
            rates[name].difference = pool.submit(_difference, name, side).result()
        for _ in range(rounds):
            for name, rate in rates.items():
                rate.one.append(pool.submit(_rate, name, side, seconds).result())
                both = [pool.submit(_rate, name, side, seconds) for _ in range(2)]
                rate.two.append(sum(one.result() for one in both))
    return rates


def _load(paths: Sequence[Path]) -> None:
    PICTURES.extend(path.read_bytes() for path in paths)
    cv2.setNumThreads(1)


def _rate(name: str, side: int, seconds: float) -> float:
    route, count, began = ROUTES[name], 0, time.process_time()
    while time.process_time() - began < seconds:
        route(PICTURES[count % len(PICTURES)], side)
        count += 1
    return count / (time.process_time() - began)


def _difference(name: str, side: int) -> float:
    differences = [
        np.abs(ROUTES[name](picture, side).astype(int) - pillow(picture, side)).mean() for picture in PICTURES[:100]
    ]
    return float(np.mean(differences))


def show(rates: dict[str, Rates], side: int) -> None:
    """Print a line for every route."""
    table = Table("route", "ms an image", "images/s, 1 core", "2 cores", "share of the limit", "off Pillow, of 255")
    for name, rate in rates.items():
        one, two = rate.medians()
        row = f"{1e3 / one:.2f}", f"{one:,.0f}", f"{two:,.0f}", f"{two / (2 * one):.0%}", f"{rate.difference:.2f}"
        table.add_row(name, *row)
    table.title = f"JPEG to {side} × {side} RGB"  # noqa: RUF001
    Console(width=120).print(table)


def claims(rates: dict[str, Rates]) -> list[Claim]:
    """What the choice is worth, and how near two cores come to their limit."""
    one, two = rates[OURS].medians()
    found = []
    for name in (name for name in rates if name != OURS):
        peer = rates[name].medians()[0]
        ratio, wanted = one / peer, "" if "OpenCV" not in name else "not slower"
        told = f"{peer:,.0f} images/s", f"{one:,.0f} images/s"
        found.append(Claim(f"decoding on one core, against {name}", wanted, *told, ratio, ratio >= 1))
    share = two / (2 * one)
    limit = f"{2 * one:,.0f} images/s: twice one core"
    found.append(
        Claim("decoding on two cores", "90 % of the limit", limit, f"{two:,.0f} images/s", share, share >= 0.9)
    )
    return found


if __name__ == "__main__":
    main()
