from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageEnhance

from slipway.workloads.classifier import likeness
from tests.classifier import data

SIDE = 72  # so that the cells of the hash are whole pixels


def pixels(seed: int) -> likeness.Bytes:
    return np.asarray(data.picture(seed, SIDE, SIDE))


@given(
    cells=arrays.arrays(np.uint8, (8, 9), elements=st.integers(0, 100), unique=True),
    factor=st.integers(1, 2),
    offset=st.integers(0, 50),
)
def test_brightness_and_contrast_leave_the_hash(cells: likeness.Bytes, factor: int, offset: int) -> None:
    before, after = (
        likeness.difference_hash(np.repeat(np.kron(one, np.ones((9, 8), np.uint8))[..., None], 3, axis=2))
        for one in (cells, (cells * factor + offset).astype(np.uint8))
    )
    assert before == after


@given(cells=arrays.arrays(np.uint8, (8, 9), unique=True))
def test_a_mirror_complements_the_hash_row_by_row(cells: likeness.Bytes) -> None:
    whole = np.repeat(np.kron(cells, np.ones((9, 8), np.uint8))[..., None], 3, axis=2)
    bits, mirrored = (
        [int(bit) for bit in f"{likeness.difference_hash(np.ascontiguousarray(one)):064b}"]
        for one in (whole, whole[:, ::-1])
    )
    assert mirrored == [1 - bit for row in range(8) for bit in bits[row * 8 : row * 8 + 8][::-1]]


@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=40),
    flips=st.lists(st.tuples(st.integers(0, 39), st.sets(st.integers(0, 63), max_size=9)), max_size=10),
    bits=st.integers(0, 8),
)
@settings(max_examples=60)
def test_bands_find_every_pair_within_the_distance_once(
    hashes: list[int], flips: list[tuple[int, set[int]]], bits: int
) -> None:
    near = [hashes[at % len(hashes)] ^ sum(1 << bit for bit in places) for at, places in flips]
    every = np.array([*hashes, *near], np.uint64)
    blank = np.zeros((len(every), 8, 8, 3), np.uint8)
    found = likeness.near(every, lambda at: blank[at], bits)
    expected = [
        (i, j) for i, j in combinations(range(len(every)), 2) if (int(every[i]) ^ int(every[j])).bit_count() <= bits
    ]
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected


def saved_again(image: Image.Image, how: str) -> Image.Image:
    if how == "poorer":
        out = io.BytesIO()
        image.save(out, "JPEG", quality=30)
        return Image.open(out).convert("RGB")
    if how == "smaller":
        return image.resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC).resize((SIDE, SIDE))
    return ImageEnhance.Brightness(image).enhance(0.8)


@pytest.mark.parametrize("how", ["poorer", "smaller", "darker"])
def test_a_picture_that_was_saved_again_is_found_and_no_other(how: str) -> None:
    originals = [pixels(seed) for seed in range(30)]
    copies = [np.asarray(saved_again(Image.fromarray(one), how)) for one in originals]
    every = np.stack([*originals, *copies])
    hashes = np.array([likeness.difference_hash(one) for one in every], np.uint64)
    found = likeness.near(hashes, lambda at: every[at], 6)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(at, at + 30) for at in range(30)]
    assert found.correlation.min() > 0.97


def test_things_on_the_same_ground_are_told_apart_by_their_colours() -> None:
    ground = np.full((SIDE, SIDE, 3), 200, np.uint8)
    red, blue = ground.copy(), ground.copy()
    red[20:50, 20:50], blue[20:50, 20:50] = (200, 30, 30), (30, 30, 200)
    every = np.stack([red, blue, red])
    hashes = np.array([likeness.difference_hash(one) for one in every], np.uint64)
    found = likeness.near(hashes, lambda at: every[at], 6)
    assert (found.first.tolist(), found.second.tolist()) == ([0], [2])


@given(pairs=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_families_are_the_connected_parts(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array([pair[end] for pair in pairs], np.int64) for end in (0, 1))
    family = likeness.families(20, first, second)
    assert (family[first] == family[second]).all()
    assert (family[family] == family).all()
    assert (family <= np.arange(20)).all()
    assert len(set(family.tolist())) >= 20 - len(pairs)
