"""From the bytes of a picture, whoever sent them, to a square of RGB: checked first, decoded once, as fast as it goes.

A picture is made square by squashing it, not by cutting: what is at its edges stays, and a rotation by EXIF commutes
with it. (A linear model over gradients of the clothing photos, 5 folds: squashed .714, cut .722, padded .720; the
differences are within chance, ±.012.)

JPEGs are decoded by libjpeg-turbo at the smallest of its scales (eighths, in the frequency domain) that is still large
enough, and OpenCV makes the rest of the way; `benchmarks/decoding.py` has the figures that chose them. All else, and a
JPEG that is odd (CMYK) or that libjpeg-turbo complains of, is read by Pillow. OpenCV could decode as fast, but takes a
file that is cut for a whole one.

Nothing is decoded before its bytes and its pixels are known to be within limits, and only plain formats are read: no
EPS, for which Pillow starts a program.
"""

# S side of the square
from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from slipway.errors import PictureError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
END_OF_JPEG = b"\xff\xd9"
ORIENTATION = 0x0112  # the tag of EXIF
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, ArithmeticError)
"""What Pillow's readers raise over bytes that are not what they say."""
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of one channel with more than 8 bits."""


@dataclass(frozen=True)
class Limits:
    """What a picture may be."""

    max_bytes: int
    max_pixels: int
    min_side: int
    """The shorter side, in pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture that was read."""

    pixels: Pixels
    """[S, S, 3] RGB."""
    format: str
    """What it is, whatever its name says: one of FORMATS."""
    width: int
    """Upright."""
    height: int
    notes: tuple[str, ...]
    """What is unusual about it: cmyk, grey, palette, alpha, deep (over 8 bits), animated, rotated."""


def decode(data: bytes, side: int, limits: Limits, squashed: Pixels | None = None) -> Picture:
    """Read a picture into a square of `side` pixels, upright, over white where it is transparent.

    Args:
        data: the file.
        side: of the square, in pixels.
        limits: what the picture may be.
        squashed: the square as it is stored, if a GPU has decoded what `plain` let through.

    Raises:
        PictureError: empty, huge, not_an_image, tiny, truncated.
    """
    image = _open(data, limits)
    orientation = _orientation(image)
    notes = _notes(image, orientation)
    width, height = image.size
    pixels = squashed
    if pixels is None and _fast(image):
        pixels = _jpeg(data, side)
    if pixels is None:
        pixels = _pillow(image, side)
    if 5 <= orientation <= 8:
        width, height = height, width
    return Picture(_upright(pixels, orientation), str(image.format), width, height, notes)


def plain(data: bytes, limits: Limits) -> bool:
    """Whether the header is that of an ordinary JPEG within limits, and the file is not cut: safe to give to a GPU."""
    try:
        return _fast(_open(data, limits)) and data.endswith(END_OF_JPEG)
    except PictureError:
        return False


def _fast(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _open(data: bytes, limits: Limits) -> Image.Image:
    """Read the header alone."""
    if not data:
        raise PictureError("the file is empty", "empty")
    if len(data) > limits.max_bytes:
        raise PictureError(f"{len(data):,} bytes, over {limits.max_bytes:,}", "huge")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; size is judged below, and is Pillow's error far above
            image = Image.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError as error:
        raise PictureError("no picture of a known format", "not_an_image") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"far over {limits.max_pixels:,} pixels", "huge") from error
    except BROKEN as error:
        raise PictureError(f"a broken header: {error}", "truncated") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PictureError(f"{width:,} × {height:,} pixels, over {limits.max_pixels:,}", "huge")  # noqa: RUF001
    if min(width, height) < limits.min_side:
        raise PictureError(f"{width} × {height} pixels, a side under {limits.min_side}", "tiny")  # noqa: RUF001
    return image


@lru_cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (*BROKEN, MemoryError):  # metadata that are broken do no harm to the picture
        return 1


def _notes(image: Image.Image, orientation: int) -> tuple[str, ...]:
    mode = image.mode
    found = {
        "cmyk": mode in ("CMYK", "YCCK"),
        "grey": mode in ("1", "L", "LA", *DEEP),
        "palette": mode in ("P", "PA"),
        "alpha": mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
        "deep": mode in DEEP,
        "animated": image.format in ("GIF", "WEBP", "PNG", "AVIF") and bool(getattr(image, "is_animated", False)),
        "rotated": 2 <= orientation <= 8,
    }
    return tuple(name for name, there in found.items() if there)


def _jpeg(data: bytes, side: int) -> Pixels | None:
    """Decode a JPEG at a reduced scale; None where libjpeg-turbo has anything to say, and Pillow is to judge."""
    try:
        decoded = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=side, min_width=side, strict=True)
    except ValueError:
        return None
    # What is reduced by less than 2 does not alias; a picture over 16 times too large still would.
    smooth = max(decoded.shape[:2]) < 2 * side
    kind = cv2.INTER_LINEAR if smooth else cv2.INTER_AREA
    return np.asarray(cv2.resize(decoded, (side, side), interpolation=kind), np.uint8)


def _pillow(image: Image.Image, side: int) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.draft(None, (side, side))  # only where it is a JPEG
            image.load()
            return np.asarray(_rgb(image).resize((side, side), Image.Resampling.BILINEAR))
    except (*BROKEN, MemoryError) as error:
        raise PictureError(f"its data end or break: {error}", "truncated") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP:
        values = np.asarray(image, np.float64)
        # 16 bits are known to end at 65535; wider ones say nothing of their range, so their own extremes are taken.
        low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (float(values.min()), float(values.max()))
        return Image.fromarray(np.uint8((values - low) / max(high - low, 1e-9) * 255)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn the picture as EXIF asks; for a square every case is a transposition and two mirrors."""
    if not 2 <= orientation <= 8:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
