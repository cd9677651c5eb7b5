"""How training pictures are varied, in the process that makes a batch: a function of a generator and the pictures.

Cut out of the stored picture at a random place, size and aspect, mirrored, changed in light and colour, parts of it
covered; then two pictures may be mixed: laid over one another (mixup: Zhang et al. 2018, arXiv:1710.09412) or one set
into the other (CutMix: Yun et al. 2019, arXiv:1905.04899). All of it in bytes, so that a batch travels small.
"""

# B batch, R side as stored, S side that the network sees
from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from slipway.workloads.base import Tensors
from slipway.workloads.classifier.params import AugmentParams

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

GREY = (0.299, 0.587, 0.114)  # of R, G, B in the brightness that is seen (ITU-R BT.601)
MIDDLE = 128.0  # the grey that contrast is about
ASPECT = 4 / 3  # largest ratio of a crop's sides
COVERED = 0.25  # largest share of a picture that is covered


def batch(pixels: Bytes, labels: Ints, side: int, params: AugmentParams, rng: np.random.Generator) -> Tensors:
    """Vary a batch.

    Args:
        pixels: [B, R, R, 3] as stored.
        labels: [B]
        side: of the pictures made, in pixels.
        params: how strongly.
        rng: source of chance.

    Returns:
        image_BHWC [B, S, S, 3] uint8, label_B and other_B [B] int64, share_B [B] float32: how much of a picture is of
        class `label_B`; the rest is of `other_B`.
    """
    made = np.stack([varied(each, side, params, rng) for each in pixels])
    covered(made, params.cover, rng)
    share = np.ones(len(made), np.float32)
    order = rng.permutation(len(made))
    if rng.random() < params.mix:
        made, share = mixed(made, order, rng) if rng.random() < 0.5 else inset(made, order, rng)
    return {"image_BHWC": made, "label_B": labels, "other_B": labels[order], "share_B": share}


def view(pixels: Bytes, side: int) -> Bytes:
    """What the network sees of one stored picture [R, R, 3] outside of training: all of it, at its own size."""
    if len(pixels) == side:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


def views(pixels: Bytes, side: int) -> Bytes:
    """The same of several: [n, R, R, 3] -> [n, S, S, 3]."""
    return np.stack([view(each, side) for each in pixels])


def varied(pixels: Bytes, side: int, params: AugmentParams, rng: np.random.Generator) -> Bytes:
    """Cut out a random part, turned and perhaps mirrored, in other colours: [S, S, 3]."""
    whole = len(pixels)
    area = whole * whole * rng.uniform(params.smallest, 1.0)
    aspect = math.exp(rng.uniform(-1, 1) * math.log(ASPECT))
    width, height = (min(float(whole), math.sqrt(area * ratio)) for ratio in (aspect, 1 / aspect))
    left, top = rng.uniform(0, whole - width), rng.uniform(0, whole - height)
    turn = math.radians(rng.uniform(-params.turn, params.turn)) if params.turn else 0.0
    mirrored = -1.0 if params.mirror and rng.random() < 0.5 else 1.0
    # Where in the stored picture the pixel (u, v) of the made one comes from: scaled, mirrored and turned in one go.
    cosine, sine = math.cos(turn), math.sin(turn)
    across, down = mirrored * width / side, height / side
    a, b, c, d = across * cosine, -down * sine, across * sine, down * cosine
    x, y = left + width / 2 - (a + b) * side / 2, top + height / 2 - (c + d) * side / 2
    image = Image.fromarray(pixels)
    made = image.transform(
        (side, side), Image.Transform.AFFINE, (a, b, x, c, d, y), Image.Resampling.BILINEAR, fillcolor=_edge(pixels)
    )
    return np.asarray(coloured(made, params.colour, rng))


def _edge(pixels: Bytes) -> tuple[int, ...]:
    """Colour of the corners, which fills what a turn uncovers."""
    return tuple(int(value) for value in pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0))


def coloured(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation, each by a factor of 1 - strength to 1 + strength."""
    if strength == 0:
        return image
    bright, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    # All three are linear in the colours, so they are one matrix: towards the pixel's grey, then towards the mean one.
    matrix = bright * contrast * (saturation * np.eye(3) + (1 - saturation) * np.array(GREY))
    middle = bright * (1 - contrast) * MIDDLE
    return image.convert("RGB", tuple(np.column_stack([matrix, np.full(3, middle)]).ravel().tolist()))


def covered(image_BHWC: Bytes, share: float, rng: np.random.Generator) -> None:
    """Cover a rectangle of that share of the pictures with grey (random erasing: Zhong et al., arXiv:1708.04896)."""
    side = image_BHWC.shape[1]
    for at in np.flatnonzero(rng.random(len(image_BHWC)) < share):
        rows, columns = _rectangle(side, rng.uniform(0.02, COVERED), rng)
        image_BHWC[at, rows, columns] = rng.integers(0, 256, 3)


def mixed(image_BHWC: Bytes, order: Ints, rng: np.random.Generator) -> tuple[Bytes, Floats]:
    """Lay over each picture the one that `order` names, each pair at its own share."""
    share = rng.beta(0.4, 0.4, len(image_BHWC)).astype(np.float32)
    weight = share[:, None, None, None]
    return (weight * image_BHWC + (1 - weight) * image_BHWC[order] + np.float32(0.5)).astype(np.uint8), share


def inset(image_BHWC: Bytes, order: Ints, rng: np.random.Generator) -> tuple[Bytes, Floats]:
    """Set into each picture a rectangle of the one that `order` names, each pair at its own place."""
    side, made = image_BHWC.shape[1], image_BHWC.copy()
    share = np.ones(len(made), np.float32)
    for at, other in enumerate(order):
        rows, columns = _rectangle(side, rng.uniform(0, 1), rng)
        made[at, rows, columns] = image_BHWC[other, rows, columns]
        share[at] = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (side * side)
    return made, share


def _rectangle(side: int, share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A rectangle of that share of the area, nearly square."""
    aspect = math.exp(rng.uniform(-1, 1) * math.log(ASPECT))
    height, width = (min(side, round(side * math.sqrt(share * ratio))) for ratio in (aspect, 1 / aspect))
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    return slice(int(top), int(top + height)), slice(int(left), int(left + width))
