"""Pictures with every fault and oddity, made with Pillow: what each should be taken for."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.classifier import data

FAULTS = {
    "empty.jpg": "empty",
    "text.jpg": "not_an_image",
    "drawing.svg": "not_an_image",
    "cut.jpg": "truncated",
    "cut.png": "truncated",
    "head.jpg": "truncated",
    "tiny.png": "tiny",
    "bomb.png": "huge",
    "far_too_large.png": "huge",
    "fat.bmp": "huge",
}
NOTES = {
    "really_png.jpg": "wrong_extension",
    "no_ending": "wrong_extension",
    "inks.jpg": "cmyk",
    "grey.jpg": "grey",
    "grey.png": "grey",
    "table.gif": "palette",
    "clear.png": "alpha",
    "deep.png": "deep",
    "moving.gif": "animated",
    "sideways.jpg": "rotated",
}
LIMITS = {"max_megapixels": 1.0, "max_mb": 1.0, "min_side": 8}
"""Under which they are faults."""


def write(folder: Path, first: int = 5000) -> None:
    """Write all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = iter(data.picture(first + number) for number in range(100))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("a page that says 404")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    whole = jpeg(next(made))
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "head.jpg").write_bytes(whole[:40])
    out = io.BytesIO()
    next(made).save(out, "PNG")
    (folder / "cut.png").write_bytes(out.getvalue()[:-400])
    data.picture(first - 1, 7, 60).save(folder / "tiny.png")
    (folder / "bomb.png").write_bytes(bomb(5000, 5000))
    (folder / "far_too_large.png").write_bytes(bomb(60_000, 60_000))
    Image.new("RGB", (700, 500)).save(folder / "fat.bmp")
    next(made).save(folder / "really_png.jpg", "PNG")
    next(made).save(folder / "no_ending", "JPEG")
    next(made).convert("CMYK").save(folder / "inks.jpg")
    next(made).convert("L").save(folder / "grey.jpg")
    next(made).convert("L").save(folder / "grey.png")
    next(made).convert("P").save(folder / "table.gif")
    over = next(made).convert("RGBA")
    over.putalpha(Image.linear_gradient("L").resize(over.size))
    over.save(folder / "clear.png")
    values = np.asarray(next(made).convert("L"), np.uint16) * 257
    Image.fromarray(values).save(folder / "deep.png")
    frame = next(made)
    frame.save(folder / "moving.gif", save_all=True, append_images=[next(made)])
    (folder / "sideways.jpg").write_bytes(jpeg(next(made), orientation=6))


def jpeg(image: Image.Image, orientation: int | None = None, quality: int = 92) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, exif=exif)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
