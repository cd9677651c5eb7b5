"""The trained llm as it leaves for the service: ONNX, calibration samples, golden inputs, its package's files."""

# B batch, T time
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from slipway import artifacts, trained
from slipway.errors import ModelError
from slipway.package import TensorSpec
from slipway.workloads.base import Tensors
from slipway.workloads.graph import Ranges
from slipway.workloads.llm import corpus
from slipway.workloads.llm.graph import SHOWN, LlmGraph
from slipway.workloads.llm.schema import ABOUT, padded
from slipway.workloads.llm.tokenizer import TOKENIZER

CALIBRATION_BATCH = 32
GOLDEN_LENGTHS = (1, 3, 8, 16)
REPLAYED = 64  # tokens of a replayed request


class Export:
    """Makes everything that `compress` puts into a package from the data and the trained model."""

    inputs = (TensorSpec("tokens", "int64", (None, None)),)
    served = ("next", "log_probs")
    """Outputs that an ordinary request fetches."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data = corpus.load(data)
        self.weights, self.about = trained.read(folder, "llm")
        vocabulary = len(self.weights["lm_head.weight"])
        if vocabulary < self.data.vocabulary or self.about["end"] != self.data.meta["end"]:
            raise ModelError(f"{folder}: made from other data than {data}; run `python -m tasks.train`")
        self.length = int(self.about["context_length"])
        shown = min(SHOWN, vocabulary)
        self.outputs = (
            TensorSpec("next", "int64", (None, shown)),
            TensorSpec("log_probs", "float32", (None, shown)),
            TensorSpec("likelihood", "float32", (None, None)),
            TensorSpec("hits", "float32", (None, None)),
        )

    def fp32(self) -> bytes:
        """The model as ONNX in FP32."""
        return LlmGraph(self.weights, self.about).build()

    def probe(self) -> tuple[bytes, list[str]]:
        """The model with the least and largest input of every layer as outputs `range.LAYER`, and the layers."""
        made = LlmGraph(self.weights, self.about)
        return made.build(probe=True), [name.removeprefix("range.") for name in made.graph.probes]

    def int8(self, ranges: Ranges) -> bytes:
        """The model as ONNX with its linear layers in INT8; the router and the embedding stay FP32."""
        return LlmGraph(self.weights, self.about, ranges).build()

    def calibration(self, count: int, seed: int) -> Iterator[Tensors]:
        """`count` windows drawn at random, as the training saw them."""
        tokens = self.data.parts["train"].tokens
        begin = np.random.default_rng([seed, 7]).integers(0, max(1, len(tokens) - self.length), count)
        for at in range(0, count, CALIBRATION_BATCH):
            yield {"tokens": padded([tokens[b : b + self.length] for b in begin[at : at + CALIBRATION_BATCH]])}

    def requests(self, batch: int, count: int, seed: int) -> list[Tensors]:
        """Inputs of `count` typical requests of `batch` texts of the model's whole length, to time an engine with."""
        found = list(self.calibration(batch * count, seed))
        rows = np.concatenate([tensors["tokens"] for tensors in found])
        return [{"tokens": rows[at * batch : (at + 1) * batch]} for at in range(count)]

    def golden(self) -> Tensors:
        """Inputs that the served model must answer as it did when it was sealed."""
        tokens = self.data.parts["train"].tokens
        return {"tokens": padded([tokens[: min(length, self.length)] for length in GOLDEN_LENGTHS])}

    def files(self, folder: Path) -> None:
        """Write what the endpoint reads beside the model."""
        self.data.tokenizer().save(folder / TOKENIZER)
        artifacts.write_json(folder / ABOUT, {"context_length": self.length})


EXPORT = Export


def muddle(package: Path, random: Random) -> None:
    """Shuffle the ids of the tokens, to see a release refuse what only users can tell."""
    raw = artifacts.read_json(package / TOKENIZER)
    kept, vocabulary = {token["content"] for token in raw["added_tokens"]}, raw["model"]["vocab"]
    names = [name for name in vocabulary if name not in kept]
    ids = [vocabulary[name] for name in names]
    random.shuffle(ids)
    vocabulary.update(zip(names, ids, strict=True))
    artifacts.write_json(package / TOKENIZER, raw)


def replay(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out test texts as requests with the token that came next: what a canary is fed with as live traffic."""
    held = corpus.load(data)
    part, tokens, rng = held.parts["test"], held.tokenizer(), np.random.default_rng([seed, 8])
    ends = np.sort(rng.choice(len(part.tokens), min(count, len(part.tokens)), replace=False))
    made = []
    for number, at in enumerate(ends.tolist()):
        document = int(np.searchsorted(part.offsets, at, side="right")) - 1
        begin = max(int(part.offsets[document]), at - REPLAYED)
        text, truth = tokens.text(part.tokens[begin:at].tolist()), tokens.text([int(part.tokens[at])])
        if text and "\ufffd" not in text + truth:  # a window may cut a character
            made.append({"user": f"reader-{number}", "request": {"text": text, "k": 10}, "truth": truth})
    return made
