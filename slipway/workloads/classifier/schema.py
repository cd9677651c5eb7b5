"""The classifier's own endpoint: a picture in, the likeliest classes out.

    POST /v1/classify {"image": "/9j/4AAQSkZJRg...", "k": 3}
    {"classes": [{"class": "t-shirt", "probability": 0.97}, ...]}

`image` is a file as it is (JPEG, PNG, WebP ...) in base64; a data URL is taken too. It is made square and as large as
training saw it, by the same code. It reads classifier.json of the package: classes, image_size, stored_size.
"""

# B batch, S side, C classes, K classes in an answer
from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from slipway import artifacts
from slipway.errors import DataError, ModelError, PictureError, RequestError
from slipway.workloads.base import Endpoint, Query, Tensors, parse
from slipway.workloads.classifier.augmentation import view
from slipway.workloads.classifier.decoding import Limits, decode

ABOUT = "classifier.json"
MAX_K = 100
MAX_PIXELS = 16_000_000  # of a picture: decoding one more than that would keep other requests waiting
MIN_SIDE = 4


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a request."""

    image: str
    """The picture's file, in base64."""
    k: Annotated[int, Meta(ge=1, le=MAX_K)] = 5
    """Classes wanted."""


Likely = TypedDict("Likely", {"class": str, "probability": float})
"""A class and its probability, 0..1."""


class Answer(TypedDict):
    """The likeliest classes, likeliest first."""

    classes: list[Likely]


class ClassifierEndpoint:
    """Turns files into pictures, and numbers into names of classes; see `workloads.base.Endpoint`."""

    path = "/v1/classify"
    outputs: Sequence[str] = ("probabilities",)
    slow = True
    request = Request
    answer = Answer

    def __init__(self, folder: Path) -> None:
        try:
            about = artifacts.read_json(folder / ABOUT)
            self._classes = [str(name) for name in about["classes"]]
            self._side, self._stored = int(about["image_size"]), int(about["stored_size"])
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / ABOUT}: unreadable ({error}); register the model again") from error
        self._decoder = msgspec.json.Decoder(Request)

    def decode(self, body: bytes) -> Query:
        """Read the picture."""
        request = parse(self._decoder, body)
        data = _binary(request.image)
        try:
            pixels = decode(data, self._stored, Limits(len(body), MAX_PIXELS, MIN_SIDE)).pixels
        except PictureError as error:
            raise RequestError(f"image: {error}") from error
        return Query({"image": view(pixels, self._side)}, {"k": request.k})

    def check(self, inputs: Tensors) -> None:
        """Nothing: the protocol has checked the shape, and every byte is a value."""

    def collate(self, queries: Sequence[Query]) -> Tensors:
        """Stack: image [B, S, S, 3] uint8."""
        return {"image": np.stack([query.inputs["image"] for query in queries])}

    def encode(self, query: Query, outputs: Tensors) -> Mapping[str, Any]:
        """Name the k likeliest of probabilities [C]."""
        probabilities = outputs["probabilities"]
        best = np.argsort(-probabilities, kind="stable")[: query.asked["k"]].tolist()
        return {"classes": [{"class": self._classes[at], "probability": float(probabilities[at])} for at in best]}

    def shown(self, answer: Mapping[str, Any]) -> Sequence[str]:
        """The best class alone, whatever k: what feedback says is then top-1 accuracy."""
        return [answer["classes"][0]["class"]]


def _binary(text: str) -> bytes:
    """Bytes of a file in base64, with or without the head of a data URL.

    Raises:
        RequestError: it is no base64.
    """
    head, comma, rest = text.partition(",")
    if comma and head.startswith("data:"):
        text = rest
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (ValueError, binascii.Error) as error:
        raise RequestError(f"image: not valid base64 ({error}); send the file's bytes in base64") from error


ENDPOINT: Callable[[Path], Endpoint] = ClassifierEndpoint
