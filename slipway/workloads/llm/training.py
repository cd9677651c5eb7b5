"""What the training loop needs of the llm: windows of the corpus, the model, and its likelihood on validation data.

The documents of a part stand one behind the other, each ended by its token, and a sample is a window of
`context_length` + 1 tokens of them: all but the last go in, all but the first come out. Every epoch begins its windows
at another place.
"""

# W windows, B batch, T time
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DeepseekV3Config

from slipway import artifacts
from slipway.errors import DataError, ModelError
from slipway.params import TrainParams
from slipway.workloads.base import Batches, Tensors
from slipway.workloads.llm import corpus
from slipway.workloads.llm.model import describe, make
from slipway.workloads.llm.params import LlmParams
from slipway.workloads.llm.tokenizer import TOKENIZER

Ints = npt.NDArray[np.int64]

VALIDATION_TOKENS = 1 << 15


@dataclass(frozen=True)
class Epoch(Batches):
    """The micro-batches of one epoch."""

    tokens: npt.NDArray[corpus.Kind]
    batches: Sequence[Ints]
    """Where the windows of each begin."""
    length: int
    """Tokens of a window."""

    def __len__(self) -> int:
        return len(self.batches)

    def make(self, index: int) -> Tensors:
        """Make one of them."""
        return {"token_BT": windows(self.tokens, self.batches[index], self.length)}


def windows(tokens: npt.NDArray[corpus.Kind], begin: Ints, length: int) -> Ints:
    """Gather [B, length] tokens from where each window begins."""
    gathered: Ints = tokens[begin[:, None] + np.arange(length)].astype(np.int64)
    return gathered


class LlmTask:
    """The llm as the training loop sees it."""

    metric = "log_likelihood"
    unit = "tokens"

    def __init__(self, data: Path, train: TrainParams, params: LlmParams) -> None:
        self.data, self.train, self.params = corpus.load(data), train, params
        self.length = params.context_length + 1
        self._config: DeepseekV3Config | None = None
        for part in ("train", "validation"):
            tokens = len(self.data.parts[part].tokens)
            if tokens < self.length * (train.world_size if part == "train" else 1):
                raise DataError(
                    f"{data}: part {part} holds {tokens:,} tokens, too few for {train.world_size} processes and "
                    f"windows of {self.length}; give more text, or lower train.world_size or llm.context_length"
                )

    def model(self) -> torch.nn.Module:
        """Make the model; its weights come from torch's generator, or from a folder."""
        if self.params.weights:
            self._hold_to_tokenizer(Path(self.params.weights) / TOKENIZER)
        made = make(self.params, self.data.vocabulary, self.data.meta["end"])
        self._config = made.config
        return made

    def _hold_to_tokenizer(self, path: Path) -> None:
        """Weights mean something only with the tokenizer that they were trained with."""
        own = self.data.folder / TOKENIZER
        if path.exists() and artifacts.read_json(path).get("model") != artifacts.read_json(own)["model"]:
            raise ModelError(f"{path}: not the tokenizer of the data; set ingest.tokenizer.file to it")

    def about(self) -> dict[str, Any]:
        """What the export has to know beside the weights."""
        assert self._config is not None  # the model was made, or there is nothing to export
        known = {"context_length": self.params.context_length, "end": self.data.meta["end"], **describe(self._config)}
        folder = self.params.weights
        started = {"weights": folder, "sha256": artifacts.sha256(Path(folder))} if folder else None
        return {**known, "started_from": started}

    def epoch(self, epoch: int, ranks: int) -> Epoch:
        """Give the micro-batches of an epoch in the order of training; `ranks` is of no account: all cost the same."""
        size = self.train.batch_size
        tokens, step = self.data.parts["train"].tokens, self.params.context_length
        rng = np.random.default_rng([self.train.seed, 2, epoch])
        start = int(rng.integers(min(step, len(tokens) - self.length + 1)))
        count = (len(tokens) - start - 1) // step
        wanted = min(count, self.params.epoch_tokens // step or count)
        begin = start + step * rng.choice(count, wanted, replace=False)
        return Epoch(tokens, [begin[at : at + size] for at in range(0, len(begin), size)], self.length)

    def count(self, batch: Tensors) -> int:
        """Tokens that a batch predicts."""
        return int(batch["token_BT"][:, 1:].size)

    def validate(self, model: torch.nn.Module, rank: int) -> tuple[float, int]:
        """Sum over windows of the mean log-likelihood of their tokens, and their number, on this rank's share."""
        tokens, step = self.data.parts["validation"].tokens, self.params.context_length
        count = (len(tokens) - 1) // step
        chosen = np.random.default_rng([self.train.seed, 1]).permutation(count)[: max(1, VALIDATION_TOKENS // step)]
        ranks, size = self.train.world_size, self.train.batch_size
        mine = np.arange(rank, ranks * -(-len(chosen) // ranks), ranks)  # as many on every rank; some count nothing
        begin, counts = chosen[mine % len(chosen)] * step, mine < len(chosen)
        device, total = next(model.parameters()).device, 0.0
        for at in range(0, len(mine), size):
            rows = torch.from_numpy(windows(tokens, begin[at : at + size], self.length)).to(device)
            total += float(model(token_BT=rows, each=True).double().cpu().numpy() @ counts[at : at + size])
        return total, int(counts.sum())

    def figures(self, metric: float) -> Mapping[str, float]:
        """Perplexity, of the mean log-likelihood of a token."""
        return {"perplexity": math.exp(-metric)}


TASK = LlmTask
