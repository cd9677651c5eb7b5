from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from slipway.errors import PictureError
from slipway.workloads.classifier import decoding
from slipway.workloads.classifier.decoding import Limits
from tests.classifier import data, faults
from tests.conftest import ROOT

CLOTHING = ROOT.parent / "shared/data/clothing"
LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000, min_side=8)


def reference(content: bytes, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Pillow alone: every pixel decoded, turned upright, then made square."""
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(upright.resize((side, side), Image.Resampling.BILINEAR), np.float64)


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(8, 400),
    height=st.integers(8, 400),
    side=st.integers(16, 64),
    quality=st.integers(60, 100),
)
@settings(max_examples=20)
def test_a_reduced_jpeg_is_what_pillow_makes_of_the_whole(
    seed: int, width: int, height: int, side: int, quality: int
) -> None:
    content = faults.jpeg(data.picture(seed, width, height), quality=quality)
    found = decoding.decode(content, side, LIMITS)
    assert (found.width, found.height, found.format, found.notes) == (width, height, "JPEG", ())
    assert np.abs(found.pixels - reference(content, side)).mean() < 15  # of 255, and these are bold; photos: below


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["JPEG", "PNG"])
def test_every_orientation_of_exif_is_turned_upright(orientation: int, ending: str) -> None:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    data.picture(orientation).save(out, ending, exif=exif)
    found = decoding.decode(out.getvalue(), 32, LIMITS)
    assert np.abs(found.pixels - reference(out.getvalue(), 32)).mean() < 4
    assert found.notes == (() if orientation == 1 else ("rotated",))
    assert (found.width, found.height) == ((40, 60) if orientation > 4 else (60, 40))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    faults.write(folder)
    return folder


@pytest.mark.parametrize(("name", "fault"), faults.FAULTS.items())
def test_a_fault_is_named(broken: Path, name: str, fault: str) -> None:
    with pytest.raises(PictureError) as error:
        decoding.decode((broken / name).read_bytes(), 32, LIMITS)
    assert error.value.fault == fault


@pytest.mark.parametrize(("name", "note"), [one for one in faults.NOTES.items() if one[1] != "wrong_extension"])
def test_what_is_unusual_is_noted_and_read_as_it_looks(broken: Path, name: str, note: str) -> None:
    content = (broken / name).read_bytes()
    found = decoding.decode(content, 24, LIMITS)
    assert note in found.notes
    if note == "alpha":
        assert found.pixels[0].mean() > 250, "where it is transparent, white shines through"
    elif note == "deep":
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(image, np.float64) / 257
        assert abs(found.pixels.mean() - expected.mean()) < 3
    else:
        assert np.abs(found.pixels - reference(content, 24)).mean() < 4


def test_bytes_that_are_cut_anywhere_are_read_or_refused() -> None:
    found = set()
    for ending in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        out = io.BytesIO()
        data.picture(3).save(out, ending)
        for length in np.linspace(0, len(out.getvalue()) - 1, 40).astype(int):
            try:
                decoding.decode(out.getvalue()[:length], 32, LIMITS)
            except PictureError as error:
                found.add(error.fault)
    assert found == {"empty", "not_an_image", "truncated"}


@given(
    content=st.binary(max_size=200),
    head=st.sampled_from([b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
@settings(max_examples=60)
def test_noise_is_refused(content: bytes, head: bytes) -> None:
    with suppress(PictureError):
        decoding.decode(head + content, 32, LIMITS)


@pytest.mark.skipif(not CLOTHING.exists(), reason=f"needs the photos in {CLOTHING}")
def test_photos_differ_little_from_pillow_s_way() -> None:
    differences = []
    for path in sorted(CLOTHING.rglob("*.jpg"))[::100]:
        content = path.read_bytes()
        found = decoding.decode(content, 180, Limits(10**8, 10**8, 8))
        differences.append(np.abs(found.pixels - reference(content, 180)).mean())
    assert max(differences) < 6
    assert np.mean(differences) < 2.5
