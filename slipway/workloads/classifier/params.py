"""The classifier's own section of `params.yaml`; it imports nothing heavy, because Airflow's form is made from it.

How large the pictures are is no matter of the model's: `ingest.images.image_size` says it, `Images.image_size` tells.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slipway.params import Count, Section, Share

Side = Annotated[float, Field(gt=0, le=1)]


class AugmentParams(Section):
    """How training pictures are varied."""

    smallest: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Least share of a picture's area that is cut out at random (over 0 to 1; 1: the whole)."""
    mirror: bool = False
    """Mirror half of the pictures left to right; not where left and right differ in meaning, as in digits."""
    turn: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Largest turn, to either side (degrees, 0..180)."""
    colour: Share = 0.2
    """Largest change of brightness, contrast and saturation (share, 0..1; 0: none)."""
    cover: Share = 0.0
    """Share of the pictures of which a part is covered (0..1)."""
    mix: Share = 0.0
    """Share of the batches whose pictures are mixed in pairs, by mixup or CutMix (0..1)."""


class ClassifierParams(Section):
    """A residual network over square RGB pictures: ResNet-18 but for width, depth, and the stem for small ones."""

    width: Annotated[int, Field(ge=4, le=256)] = 16
    """Channels of the first stage; each further one has twice as many (4..256; 64: as ResNet-18)."""
    blocks: Annotated[tuple[Count, ...], Field(min_length=1, max_length=5, strict=False)] = (1, 1, 1)
    """Blocks of two convolutions in each stage (1 or more each; [2, 2, 2, 2]: as ResNet-18)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the last features dropped in training (0..1, 1 excluded)."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of a label that is spread over all classes (0..1, 1 excluded)."""
    repeats: Count = 3
    """Times that a picture is seen in an epoch, varied anew each time (1 or more): few pictures make short epochs."""
    sides: Annotated[tuple[Side, Side], Field(strict=False)] = (1.0, 1.0)
    """Sides of the pictures that training begins and ends with, as shares of the served one (over 0 to 1 each)."""
    weights: str | None = None
    """File to start from, in torchvision's layout of ResNet-18 or 34 (.pth, .safetensors); empty: from scratch."""
    augment: AugmentParams = AugmentParams()
    """How training pictures are varied."""


MODEL = ClassifierParams

TECHNIQUES = ("int8", "bf16", "tuned", "qat", "prune", "distill")
