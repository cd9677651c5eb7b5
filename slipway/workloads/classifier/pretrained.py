"""Weights from a file in torchvision's layout of ResNet-18 and 34: to begin with, before training on one's own classes.

They were trained on pictures normalised channel by channel; here all channels are normalised alike, so what differs
goes into the first convolution and the normalisation behind it. A last layer of other classes stays as it is.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipway.errors import ModelError
from slipway.workloads.classifier.model import STEP, ZERO, Network

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of a channel in 0..1, as torchvision normalises
BROKEN = (OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError, pickle.UnpicklingError)
"""What readers of weights raise over files that hold none."""
HEAD = ("fc.weight", "fc.bias")


def load(network: Network, file: Path) -> None:
    """Give `network` the weights of `file`.

    Raises:
        ModelError: no such file, no weights, or of a network with other sizes; names the first that differs.
    """
    state = _read(file)
    own = network.state_dict()
    for name in HEAD:
        if name in state and state[name].shape != own[name].shape:
            state[name] = own[name]
    for name, value in own.items():
        given = state.get(name)
        if given is None and (name in HEAD or name.endswith("num_batches_tracked")):
            state[name] = value
        elif given is None or given.shape != value.shape:
            found = "missing" if given is None else f"{list(given.shape)}"
            raise ModelError(
                f"{file}: {name} is {found}, not {list(value.shape)}; set classifier.width and classifier.blocks to "
                "those of the weights (ResNet-18: 64 and [2, 2, 2, 2]), ingest.images.image_size to 64 or more"
            )
    _renormalise(state)
    network.load_state_dict({name: state[name] for name in own})


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
        return dict(found.get("state_dict", found))
    except BROKEN as error:
        raise ModelError(f"{file}: no weights ({str(error).splitlines()[0]}); set classifier.weights") from error


def _renormalise(state: dict[str, Tensor]) -> None:
    """Take pictures as (value - ZERO) * STEP instead of (value / 255 - mean) / deviation; exact but at the borders."""
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    factor = 1 / (STEP * 255 * deviation)
    shift = (ZERO / 255 - mean) / deviation
    weight = state["conv1.weight"]
    state["bn1.running_mean"] = state["bn1.running_mean"] - torch.einsum("oihw,i->o", weight, shift)
    state["conv1.weight"] = weight * factor[:, None, None]
