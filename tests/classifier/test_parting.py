from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipway.workloads.classifier import parting
from slipway.workloads.classifier.likeness import Pairs
from slipway.workloads.classifier.parting import FATES, TEST, TRAIN, UNSAID, VALIDATION, Files, Shares

SHARES = Shares(validation=0.1, test=0.1)
rows = st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 2), st.sampled_from([UNSAID, TRAIN, VALIDATION, TEST])))


def files(table: list[tuple[int, int, int]]) -> Files:
    content, label, part = (np.array([row[at] for row in table], np.int64) for at in range(3))
    return Files(content, label, part.astype(np.int8))


@given(table=rows)
def test_each_content_counts_once_and_no_contradiction_counts(table: list[tuple[int, int, int]]) -> None:
    given_ = files(table)
    fate, twin = parting.kept(given_, given_.part)
    inside = fate <= TEST
    assert len(set(given_.content[inside].tolist())) == inside.sum()
    for content in set(given_.content.tolist()):
        here = np.flatnonzero(given_.content == content)
        said = {FATES[code] if code >= 0 else "unsaid" for code in fate[here]}
        if content < 0:
            assert said == {"fault"}
        elif len(set(given_.label[here].tolist())) > 1:
            assert said == {"conflict"}
        else:
            assert inside[here].sum() == 1
            (stays,) = here[inside[here]]
            assert (given_.part[here] <= given_.part[stays]).all(), "a held-out copy is the one that stays"
            assert (twin[here[here != stays]] == stays).all()


@given(table=rows)
def test_a_source_without_a_test_part_gives_what_it_holds_out(table: list[tuple[int, int, int]]) -> None:
    given_ = files(table)
    part = parting.sources_parts(given_)
    if TEST in given_.part:
        assert (part[given_.part == VALIDATION] == VALIDATION).all()
        assert (part[given_.part == TEST] == TEST).all()
    else:
        assert (part[given_.part == VALIDATION] == TEST).all()
        assert (part[given_.part == TRAIN] == UNSAID).all()
    assert (part[given_.part == UNSAID] == UNSAID).all()


words = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=30)


@given(digests=words, links=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=20))
def test_no_family_is_torn_and_alone_a_picture_stays_where_its_hash_puts_it(
    digests: list[tuple[int, int]], links: list[tuple[int, int]]
) -> None:
    count = len(digests)
    ends = [(a % count, b % count) for a, b in links if a % count != b % count]
    first, second = (np.array([pair[end] for pair in ends], np.int64) for end in (0, 1))
    pairs = Pairs(first, second, np.zeros(len(ends), np.int64), np.ones(len(ends)))
    fate = np.full(count, UNSAID, np.int8)
    family = parting.families_to_part(count, fate, pairs)
    hashes = np.array(digests, np.uint64)
    parts = parting.parted(fate, family, hashes, SHARES)
    assert set(parts.tolist()) <= {TRAIN, VALIDATION, TEST}
    assert (parts[first] == parts[second]).all()
    assert len(parting.leaking(parts, pairs)[0]) == 0
    alone = parting.parted(fate[:1], np.zeros(1, np.int64), hashes[:1], SHARES)
    if (family == family[0]).sum() == 1:
        assert parts[0] == alone[0]


def test_the_shares_are_those_asked_for_whatever_the_families() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (40_000, 2), dtype=np.uint64)
    family = np.repeat(np.arange(0, 40_000, 4), 4)
    parts = parting.parted(np.full(40_000, UNSAID, np.int8), family, hashes, SHARES)
    assert np.abs(np.bincount(parts, minlength=3) / 40_000 - (0.8, 0.1, 0.1)).max() < 0.02


def test_the_training_twin_of_a_held_out_picture_leaks() -> None:
    fate = np.array([TRAIN, TEST, TRAIN, TRAIN, VALIDATION, TEST], np.int8)
    first, second = np.array([0, 0, 2, 1, 3]), np.array([1, 2, 3, 5, 4])
    pairs = Pairs(first, second, np.zeros(5, np.int64), np.ones(5))
    train, of = parting.leaking(fate, pairs)
    assert dict(zip(train.tolist(), of.tolist(), strict=True)) == {0: 1, 3: 4}
