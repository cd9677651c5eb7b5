"""Which pictures are used, and which part each belongs to: pure functions of what was read.

A content that came as several files counts once. If they bear different labels nobody knows which is right, and all are
left out. Where the source does not part its pictures, the hash of the content does, so that a picture stays where it
is when others come; near duplicates go together.
"""

# F files, C contents
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slipway.workloads.classifier import likeness
from slipway.workloads.classifier.images import PARTS
from slipway.workloads.classifier.likeness import Pairs

Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int8]

FATES = (*PARTS, "fault", "duplicate", "conflict", "leak")
"""What becomes of a file: a part, or why it is left out."""
TRAIN, VALIDATION, TEST, FAULT, DUPLICATE, CONFLICT, LEAK = range(len(FATES))
UNSAID = -1
"""The source does not say which part a file belongs to."""


@dataclass(frozen=True)
class Files:
    """What was read, a row a file."""

    content: Ints
    """[F] which content it holds; -1 for none that could be read."""
    label: Ints
    """[F]"""
    part: Codes
    """[F] what the source says: UNSAID, TRAIN, VALIDATION or TEST."""


@dataclass(frozen=True)
class Shares:
    """Shares of the pictures that are held out by hash."""

    validation: float
    test: float


def sources_parts(files: Files) -> Codes:
    """Read the source's parts as ours: without a test part of its own, what it holds out is our test part, [F].

    Its validation part has usually been looked at by nobody; ours, which chooses the epoch, then comes from train.
    """
    part = files.part.copy()
    if not (part == TEST).any():
        part[part == VALIDATION] = TEST
    if not (part == VALIDATION).any():
        part[part == TRAIN] = UNSAID
    return part


def kept(files: Files, part: Codes) -> tuple[Codes, Ints]:
    """Let each content count once.

    Returns: fates [F], where UNSAID means still to be parted, and for a file left out the one it repeats, or -1 [F].
    """
    fate, twin = part.copy(), np.full(len(part), -1, np.int64)
    fate[files.content < 0] = FAULT
    there = np.flatnonzero(files.content >= 0)
    # Of equal contents the held-out one stays, and of those the first file: training on it would be a leak.
    rank = np.where(part[there] == TEST, 0, np.where(part[there] == VALIDATION, 1, 2))
    order = there[np.lexsort((there, rank, files.content[there]))]
    content = files.content[order]
    head = np.maximum.accumulate(np.where(np.diff(content, prepend=-1) != 0, np.arange(len(order)), 0))
    again = head != np.arange(len(order))
    fate[order[again]], twin[order[again]] = DUPLICATE, order[head[again]]
    torn = np.unique(content[files.label[order] != files.label[order[head]]])
    conflicting = order[np.isin(content, torn)]
    fate[conflicting] = CONFLICT
    return fate, twin


def parted(fate: Codes, family: Ints, digests: npt.NDArray[np.uint64], shares: Shares) -> Codes:
    """Give a part to those that have none yet.

    Args:    fate: of the contents, as `kept` left it [C].  family: index of the family's first content [C].
             digests: two independent words of the hash of each content [C, 2].
    """
    # The first word chooses who speaks for a family, the second is what he draws: the least of many would be too low.
    order = np.lexsort((digests[:, 0], family))
    speaker = order[np.searchsorted(family[order], family)]
    drawn = digests[speaker, 1] / 2.0**64
    test = 0.0 if (fate == TEST).any() else shares.test
    by_hash = np.where(drawn < test, TEST, np.where(drawn < test + shares.validation, VALIDATION, TRAIN))
    return np.where(fate == UNSAID, by_hash, fate).astype(np.int8)


def leaking(fate: Codes, pairs: Pairs) -> tuple[Ints, Ints]:
    """Find training contents that nearly repeat a held-out one: they, and for each its first twin."""
    a, b = pairs.first, pairs.second
    ends = np.concatenate([a, b]), np.concatenate([b, a])
    straddles = (fate[ends[0]] == TRAIN) & np.isin(fate[ends[1]], (VALIDATION, TEST))
    train, first = np.unique(ends[0][straddles], return_index=True)
    return train, ends[1][straddles][first]


def families_to_part(count: int, fate: Codes, pairs: Pairs) -> Ints:
    """Families of those contents that have no part yet; all others are alone, [count]."""
    both = (fate[pairs.first] == UNSAID) & (fate[pairs.second] == UNSAID)
    return likeness.families(count, pairs.first[both], pairs.second[both])
