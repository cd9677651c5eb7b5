"""Pictures that look alike: the same motif saved again, scaled, brightened or cut a little.

Two steps, the second of which looks only at what the first lets through. A difference hash of 64 bits (Krawetz 2013:
whether brightness rises between neighbours on a grid of 8 rows and 9 columns) finds candidates within a Hamming
distance, without comparing all with all: hashes that differ in at most b bits agree in at least one of b + 1 bands.
Then the correlation of small copies in colour confirms them, because things photographed on the same ground share
hashes by chance.
"""

# C pictures, S side, P pairs
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

LOOK = 32
"""Side of the small copy, in pixels."""
CONFIRMED = 0.98
"""Least correlation of two small copies that confirms a pair.

Of 300 photos saved again as JPEG of quality 30, at half the size, or a fifth brighter, over 99 % are found and no
other; cut by a hundredth at each edge 81 %, by a fortieth 7 %. Of 3,409 photos of clothes on the same few grounds one
pair is found, and it is one photo under two labels."""
CHUNK = 256
"""Pictures, or pairs, whose copies are held at once beside those of a block."""
BLOCK = 1 << 10
"""Members of a band's bucket that are compared with as many others at once; their copies take 24 MB."""


def difference_hash(pixels: Bytes) -> int:
    """64 bits of a picture [S, S, 3], row by row: 1 where brightness rises from one column to the next."""
    cells = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


@dataclass(frozen=True)
class Pairs:
    """Near duplicates, each pair once."""

    first: Ints
    """[P]"""
    second: Ints
    """[P], larger than the first."""
    bits: Ints
    """[P] in which their hashes differ."""
    correlation: npt.NDArray[np.floating]
    """[P] of their small copies."""


def near(hashes: Hashes, pixels: Callable[[Ints], Bytes], bits: int) -> Pairs:
    """Find the pairs of pictures that look alike.

    Args:    hashes: [C].  pixels: gives pictures [n, S, S, 3] by their indices.
             bits: largest Hamming distance of candidates.
    """
    found = [_confirmed(hashes, pixels, i, j) for i, j in _candidates(hashes, bits)]
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    first, second, apart, correlation = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], apart[order], correlation[order])


def _candidates(hashes: Hashes, bits: int) -> Iterator[tuple[Ints, Ints]]:
    """Give pairs within `bits`, the first index smaller, each in the first band that it agrees in."""
    masks: list[np.uint64] = []
    for low, high in pairwise(np.linspace(0, 64, bits + 2).astype(int).tolist()):
        masks.append(np.uint64((1 << high) - (1 << low)))
        band = hashes & masks[-1]
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(band[order][1:] != band[order][:-1]) + 1
        for bucket in (one for one in np.split(order, starts) if len(one) > 1):
            for i, j in _within(hashes, bucket, bits):
                apart = hashes[i] ^ hashes[j]
                new = np.all([apart & mask != 0 for mask in masks[:-1]], axis=0) | np.zeros(len(i), bool)
                if new.any():
                    yield i[new], j[new]


def _within(hashes: Hashes, bucket: Ints, bits: int) -> Iterator[tuple[Ints, Ints]]:
    for at in range(0, len(bucket), BLOCK):
        rows = bucket[at : at + BLOCK]
        for beside in range(at, len(bucket), BLOCK):
            columns = bucket[beside : beside + BLOCK]
            i, j = np.nonzero(np.bitwise_count(hashes[rows, None] ^ hashes[None, columns]) <= bits)
            i, j = rows[i], columns[j]
            once = i < j  # argsort is stable, so a bucket rises
            yield i[once], j[once]


def _confirmed(
    hashes: Hashes, pixels: Callable[[Ints], Bytes], i: Ints, j: Ints
) -> tuple[Ints, Ints, Ints, npt.NDArray[np.float32]]:
    asked, places = np.unique(np.concatenate([i, j]), return_inverse=True)
    shapes = np.concatenate([_shapes(pixels(asked[at : at + CHUNK])) for at in range(0, len(asked), CHUNK)])
    one, other = np.split(places, 2)
    correlation = np.concatenate(
        [
            np.einsum("pn,pn->p", shapes[one[at : at + CHUNK]], shapes[other[at : at + CHUNK]])
            for at in range(0, len(one), CHUNK)
        ]
    )
    kept = correlation >= CONFIRMED
    i, j = i[kept], j[kept]
    return i, j, np.bitwise_count(hashes[i] ^ hashes[j]).astype(np.int64), correlation[kept]


def _shapes(pixels: Bytes) -> npt.NDArray[np.float32]:
    """Small copies as vectors whose product is their correlation, [n, LOOK * LOOK * 3]; plain ones are equal."""
    copies = [np.asarray(Image.fromarray(one).resize((LOOK, LOOK), Image.Resampling.BOX)).ravel() for one in pixels]
    values = np.stack(copies).astype(np.float32)
    values -= values.mean(1, keepdims=True)
    values[~values.any(1), 0] = 1.0  # nothing but its brightness tells a plain one from another
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values


def families(count: int, first: Ints, second: Ints) -> Ints:
    """Join pairs that share a picture: for each of `count` pictures the smallest index of its family, [count]."""
    parent = np.arange(count)

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = int(parent[at])
        return at

    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    return np.array([root(at) for at in range(count)], np.int64)
