"""The network, its graph and its augmentation: what is exported answers as what was trained, whole and in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipway.compression import engine
from slipway.errors import ModelError
from slipway.workloads.classifier import augmentation, pretrained
from slipway.workloads.classifier.graph import IMAGE, ClassifierGraph, widened
from slipway.workloads.classifier.model import Network, Norm, Training, network, normalised
from slipway.workloads.classifier.params import AugmentParams
from slipway.workloads.classifier.training import side

CLASSES = ["cat", "dog", "tree"]
OFF = AugmentParams(smallest=1.0, mirror=False, turn=0.0, colour=0.0, cover=0.0, mix=0.0)


def made(size: int, width: int = 8, blocks: tuple[int, ...] = (1, 2)) -> Network:
    """A network whose normalisations do something, as those of a trained one."""
    torch.manual_seed(size)
    net = Network(len(CLASSES), size, width, blocks)
    for module in net.modules():
        if isinstance(module, Norm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def arrays(net: Network) -> dict[str, Any]:
    return {name: value.numpy() for name, value in net.state_dict().items()}


def pictures(size: int, count: int = 24) -> Any:
    return np.random.default_rng(size).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [16, 32, 64])  # one of each stem
def test_the_graph_answers_as_the_network_and_in_integers_nearly(size: int) -> None:
    net, shown = made(size), pictures(size)
    about = {"classes": CLASSES, "image_size": size, "blocks": [1, 2], "width": 8, "dropout": 0.0}
    with torch.no_grad():
        expected = network(arrays(net), about)(normalised(torch.from_numpy(shown))).numpy()
    full = ClassifierGraph(arrays(net), about).build()
    probed = ClassifierGraph(arrays(net), about)
    probe = engine.load(probed.build(probe=True), "probe")
    ranges = engine.ranges(probe, [name.removeprefix("range.") for name in probed.graph.probes], [{IMAGE: shown}])
    whole = ClassifierGraph(arrays(net), about, ranges).build()
    logits, probabilities = engine.load(full, "fp32")(["logits", "probabilities"], {IMAGE: shown})
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    rounded = engine.load(whole, "int8")(["logits"], {IMAGE: shown})[0]
    assert np.abs(rounded - expected).max() < 0.1 * np.ptp(expected), "INT8 is far off"
    assert len(whole) < 0.6 * len(full)


@pytest.mark.parametrize("side", [3, 7])
def test_a_convolution_over_blocks_of_pixels_is_the_one_over_pixels(side: int) -> None:
    rng = np.random.default_rng(side)
    weight, image = rng.integers(-9, 9, (5, 3, side, side)), rng.integers(0, 9, (2, 16, 16, 3))
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).double()
    expected = torch.conv2d(pixels, torch.from_numpy(weight).double(), stride=2, padding=side // 2)
    wide, left = widened(weight, 2)
    blocks = torch.from_numpy(image.reshape(2, 16, 4, 12)).permute(0, 3, 1, 2).double()
    blocks = torch.nn.functional.pad(blocks, (left, wide.shape[-1] - 1 - left, side // 2, side // 2))
    found = torch.conv2d(blocks, torch.from_numpy(wide).double(), stride=(2, 1)).permute(0, 2, 3, 1)
    assert torch.equal(found.reshape(2, 8, 8, 5), expected.permute(0, 2, 3, 1))


def test_statistics_stay_in_full_precision_when_the_network_is_cast() -> None:
    cast = Training(made(16), 0.1).to(torch.bfloat16)
    statistics = [each.running_var for each in cast.modules() if isinstance(each, Norm)]
    assert {each.dtype for each in statistics if each is not None} == {torch.float32}
    shown = pictures(16)
    with torch.no_grad():
        close = cast.logits(torch.from_numpy(shown)) - made(16)(normalised(torch.from_numpy(shown)))
    assert float(close.abs().max()) < 0.2


def test_weights_in_torchvisions_layout_see_the_same_though_pictures_are_normalised_otherwise(tmp_path: Path) -> None:
    theirs, ours = made(64), Network(5, 64, 8, (1, 2)).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    head = ours.fc.weight.clone()
    pretrained.load(ours, tmp_path / "resnet.pth")
    assert (ours.fc.weight == head).all(), "the last layer is of other classes, and stays"
    shown = torch.from_numpy(pictures(64))
    scaled = (shown / 255 - torch.tensor(pretrained.MEAN)) / torch.tensor(pretrained.DEVIATION)
    with torch.no_grad():
        expected, found = (
            net.bn1(net.conv1(x))[:, :, 4:-4, 4:-4]  # at the border what is padded differs
            for net, x in ((theirs, scaled.permute(0, 3, 1, 2)), (ours, normalised(shown)))
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_weights_that_do_not_fit_are_told_by_name(tmp_path: Path) -> None:
    torch.save(made(64).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ModelError, match=r"conv1.weight is \[8, 3, 7, 7\], not \[16, 3, 7, 7\]; set classifier.width"):
        pretrained.load(Network(3, 64, 16, (1, 2)), tmp_path / "resnet.pth")
    (tmp_path / "torn.pth").write_bytes(b"torn")
    with pytest.raises(ModelError, match="no weights"):
        pretrained.load(Network(3, 64, 8, (1, 2)), tmp_path / "torn.pth")


@given(seed=st.integers(0, 1 << 32))
def test_a_mixed_pictures_label_says_how_much_of_each_is_in_it(seed: int) -> None:
    values = np.array([0, 60, 120, 240], np.uint8)
    flat = np.broadcast_to(values[:, None, None, None], (4, 20, 20, 3)).copy()
    params = OFF.model_copy(update={"mix": 1.0})
    batch = augmentation.batch(flat, np.arange(4), 16, params, np.random.default_rng(seed))
    share = batch["share_B"].astype(np.float64)
    expected = share * values[batch["label_B"]] + (1 - share) * values[batch["other_B"]]
    np.testing.assert_allclose(batch["image_BHWC"].mean((1, 2, 3)), expected, atol=0.6)


def test_without_any_variation_a_picture_is_seen_whole() -> None:
    smooth = np.add.outer(np.arange(36), np.arange(36)).astype(np.uint8)[None, :, :, None].repeat(3, 3)
    batch = augmentation.batch(smooth, np.zeros(1, np.int64), 32, OFF, np.random.default_rng(0))
    difference = batch["image_BHWC"][0].astype(float) - augmentation.view(smooth[0], 32)
    assert np.abs(difference).max() <= 4
    assert batch["share_B"].tolist() == [1.0]


def test_a_picture_is_mirrored_turned_and_coloured_within_its_bounds() -> None:
    half = np.zeros((1, 32, 32, 3), np.uint8)
    half[:, :, :16] = 200
    params = OFF.model_copy(update={"mirror": True})
    seen = [
        augmentation.batch(half, np.zeros(1, np.int64), 32, params, np.random.default_rng(seed))["image_BHWC"][0]
        for seed in range(20)
    ]
    lefts = [bool(picture[16, 4, 0] > 100) for picture in seen]
    assert 3 < sum(lefts) < 17
    assert all((picture[16, 4, 0] > 100) != (picture[16, 28, 0] > 100) for picture in seen)
    grey = np.full((64, 20, 20, 3), 100, np.uint8)
    params = OFF.model_copy(update={"colour": 0.2})
    tinted = augmentation.batch(grey, np.zeros(64, np.int64), 16, params, np.random.default_rng(0))["image_BHWC"]
    assert tinted.std((1, 2, 3)).max() < 1, "a grey picture stays grey"
    assert 70 < tinted.min() < 95 < 105 < tinted.max() < 135


def test_training_pictures_grow_in_steps_to_their_last_size() -> None:
    sides = [side(112, (0.5, 0.86), epoch / 30) for epoch in range(30)]
    assert sides == sorted(sides)
    assert (sides[0], sides[-1]) == (64, 96)
    assert set(sides) == {64, 80, 96}
    assert {side(28, (1.0, 1.0), epoch / 30) for epoch in range(30)} == {28}
