"""How good an exported llm is: held-out windows, accuracy and likelihood of each, slices, and examples to look at.

A sample is a window of a held-out document: every token in it is predicted from those before it in the window. A
document's first window begins with the end of the one before, as a request does.
"""

# U samples, B batch, T time
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.workloads.base import Array, Tensors, Unknown
from slipway.workloads.llm import corpus
from slipway.workloads.llm.schema import ABOUT, padded
from slipway.workloads.llm.tokenizer import TOKENIZER, Tokens

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Run = Callable[[Sequence[str], Tensors], Sequence[Array]]

METRIC = "accuracy"
BATCH = 32
WINDOW = 256  # most tokens of a sample; a model that sees fewer has it in pieces
LONG = 1024  # tokens from which a document is a long one


@dataclass(frozen=True)
class Samples:
    """Held-out windows: where they lie in a part's tokens."""

    data: corpus.Corpus
    part: str
    begin: Ints
    """[U]"""
    end: Ints
    """[U]"""
    first: npt.NDArray[np.bool_]
    """[U] whether the window is its document's first."""
    long: npt.NDArray[np.bool_]
    """[U] whether its document is long."""
    seed: int

    def __len__(self) -> int:
        return len(self.begin)

    def of(self, sample: int) -> list[int]:
        """Tokens of a window."""
        found: list[int] = self.data.parts[self.part].tokens[self.begin[sample] : self.end[sample]].tolist()
        return found


def samples(data: Path, split: str, count: int, seed: int) -> Samples:
    """Draw held-out windows: `count` at random, or all for 0; `split` is validation or test."""
    held = corpus.load(data)
    offsets = np.asarray(held.parts[split].offsets)
    start = np.maximum(offsets[:-1] - 1, 0)  # the end token of the document before
    pieces = -(-(offsets[1:] - start - 1) // (WINDOW - 1))
    document = np.repeat(np.arange(len(pieces)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = start[document] + nth * (WINDOW - 1)
    end = np.minimum(begin + WINDOW, offsets[1:][document])
    long = np.diff(offsets)[document] >= LONG
    chosen = np.arange(len(begin))
    if count and count < len(begin):
        chosen = np.sort(np.random.default_rng([seed, 4]).choice(len(begin), count, replace=False))
    return Samples(held, split, begin[chosen], end[chosen], (nth == 0)[chosen], long[chosen], seed)


def score(run: Run, chosen: Samples, package: Path, sampled: bool = True) -> dict[str, Floats]:
    """Score an exported model on each window.

    Args:
        run: runs the model: names of outputs, inputs -> outputs.
        chosen: the windows.
        package: folder with the model's tokenizer and llm.json; its tokenizer may differ from that of the data.
        sampled: of no account here.

    Returns:
        [U] each: accuracy (share of the tokens that were the likeliest) and log_likelihood (mean of a token).
    """
    cut = _cutter(chosen.data, package)
    length = artifacts.read_json(package / ABOUT)["context_length"]
    rows: list[list[int]] = []
    of: list[int] = []
    for sample in range(len(chosen)):
        ids = cut(chosen.of(sample))
        pieces = [ids[at : at + length] for at in range(0, max(1, len(ids) - 1), length - 1)]
        rows += pieces
        of += [sample] * len(pieces)
    sums = np.zeros((len(chosen), 3))  # hits, log-likelihoods, tokens
    order = np.argsort([len(row) for row in rows], kind="stable")  # like lengths share a batch: less padding
    for at in range(0, len(order), BATCH):
        batch = [rows[i] for i in order[at : at + BATCH]]
        likelihood, hits = run(["likelihood", "hits"], {"tokens": padded(batch)})
        counted = np.stack([hits.sum(1), likelihood.astype(np.float64).sum(1), [len(row) - 1 for row in batch]], 1)
        np.add.at(sums, [of[i] for i in order[at : at + BATCH]], counted)
    tokens = np.maximum(sums[:, 2], 1)
    return {"accuracy": sums[:, 0] / tokens, "log_likelihood": sums[:, 1] / tokens}


def _cutter(data: corpus.Corpus, package: Path) -> Callable[[list[int]], list[int]]:
    """What makes tokens of the package out of tokens of the data."""
    if artifacts.sha256(package / TOKENIZER) == artifacts.sha256(data.folder / TOKENIZER):
        return list
    own, other = data.tokenizer(), Tokens.load(package / TOKENIZER)

    def cut(ids: list[int]) -> list[int]:
        first, last = ids[0] == own.end, ids[-1] == own.end
        inner = ids[first : len(ids) - last]
        (found,) = other.encode([own.text(inner)])
        return [*[other.end] * first, *found, *[other.end] * last]

    return cut


def figures(means: Mapping[str, float]) -> dict[str, float]:
    """Perplexity, of the mean log-likelihood of a token."""
    return {"perplexity": math.exp(-means["log_likelihood"])}


def unknown(chosen: Samples, package: Path) -> list[Unknown]:
    """Nothing: every text is bytes, and every byte is a token."""
    return []


def slices(chosen: Samples) -> dict[str, npt.NDArray[np.bool_]]:
    """Parts of the samples that are looked at alone: [U] masks."""
    return {
        "start of a document": chosen.first,
        "within a document": ~chosen.first,
        f"document under {LONG} tokens": ~chosen.long,
        f"document of {LONG} tokens or more": chosen.long,
    }


def examples(run: Run, chosen: Samples, package: Path, count: int = 8) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of texts, what the model shows for them, and what came next."""
    cut, tokens = _cutter(chosen.data, package), Tokens.load(package / TOKENIZER)
    length = artifacts.read_json(package / ABOUT)["context_length"]
    rng, rows = np.random.default_rng([chosen.seed, 6]), []
    for sample in rng.permutation(len(chosen))[:count]:
        ids = cut(chosen.of(int(sample)))
        if len(ids) < 2:
            continue
        at = int(rng.integers(1, len(ids)))
        past, truth = ids[max(0, at - length) : at], ids[at]
        best = run(["next"], {"tokens": padded([past])})[0][0][:5].tolist()
        shown = [f"✓ {_quoted(tokens, i)}" if i == truth else _quoted(tokens, i) for i in best]
        rows.append([tokens.text(past)[-60:], ", ".join(shown), _quoted(tokens, truth)])
    return ["text (its end)", "shown (best 5)", "came next"], rows


def _quoted(tokens: Tokens, number: int) -> str:
    return repr(tokens.text([number]))
