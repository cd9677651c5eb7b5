from __future__ import annotations

import numpy as np
import pytest

from slipway.workloads.classifier import dali, decoding
from slipway.workloads.classifier.decoding import Limits
from tests.classifier import data, faults

LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000, min_side=8)


def test_only_whole_ordinary_jpegs_within_limits_are_given_to_a_gpu() -> None:
    whole = faults.jpeg(data.picture(1))
    assert decoding.plain(whole, LIMITS)
    assert not decoding.plain(whole[:-2], LIMITS)
    assert not decoding.plain(whole, Limits(1_000_000, 100, 8))
    assert not decoding.plain(faults.jpeg(data.picture(1).convert("CMYK")), LIMITS)
    assert not decoding.plain(faults.bomb(10, 10), LIMITS)
    assert not decoding.plain(b"", LIMITS)


@pytest.mark.skipif(not dali.installed(), reason="needs DALI: pip install nvidia-dali-cuda120")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_dali_decodes_is_what_the_processor_decodes() -> None:
    files = [faults.jpeg(data.picture(seed, 80 + seed, 60), orientation=1 + seed % 8) for seed in range(70)]
    squares = dali.decode(files, 32, device="cpu")
    for file, square in zip(files, squares, strict=True):
        assert square is not None
        found, expected = decoding.decode(file, 32, LIMITS, square), decoding.decode(file, 32, LIMITS)
        assert np.abs(found.pixels.astype(int) - expected.pixels).mean() < 12
    broken = files[0][:400] + b"\xff\xd9"
    assert dali.decode([broken, files[1]], 32, device="cpu") == [None, None], "the processor is to judge both"
    assert dali.decode(files[:3], 32, device="cpu")[2] is not None, "the pipeline was not made anew"
