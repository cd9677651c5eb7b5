"""What `validate` sees of the llm's data: figures, frames in chunks, plots. Limits: expectations.json."""

# N tokens, D documents
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slipway.reporting import PALETTE, Chapter, Note, Plot, Table, canvas
from slipway.validation import MAX_ROWS, Frame, Subject
from slipway.workloads.llm import corpus
from slipway.workloads.llm.corpus import PARTS

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]

CHUNK = 1 << 20
ROWS = 100_000
FLOOR = 1e-4
"""Least share in a bin of the stability index, where the logarithm of an empty one would be infinite."""


def examine(folder: Path, before: Mapping[str, Any] | None) -> Subject:
    """Look at the texts of `folder`; `before` is the profile of the last accepted version of their source."""
    data = corpus.load(folder)
    meta, alphabet = data.meta, _alphabet(folder)
    dropped, rows = meta["dropped"], meta["rows"]
    figures = {
        "rows": rows,
        "documents": meta["documents"],
        "tokens": meta["tokens"],
        "vocabulary": data.vocabulary,
        **{f"{reason}_ratio": count / rows for reason, count in dropped.items()},
        "bytes_a_token": meta["bytes"] / meta["tokens"],
        "unknown_tokens": _unknown(data),
        "volume_ratio": None if before is None else meta["tokens"] / before["tokens"],
        "psi": None if before is None else float(stability(alphabet, before)[2].sum()),
    }
    frames = {
        "held out": Frame(lambda: _held_out(data), ("name", "part")),
        "documents": Frame(lambda: _documents(data, PARTS), ("name", "part")),
    }
    profile = {"tokens": meta["tokens"], "alphabet": alphabet.tolist()}
    suite, headline = Path(__file__).with_name("expectations.json"), ("rows", "documents", "tokens", "vocabulary")
    return Subject(suite, frames, figures, _rejects(folder), profile, headline)


def _alphabet(folder: Path) -> npt.NDArray[np.int64]:
    return np.asarray(np.load(folder / "bytes.npy"), np.int64)


def _unknown(data: corpus.Corpus) -> int:
    return sum(
        int((part.tokens[at : at + CHUNK] >= data.vocabulary).sum())
        for part in data.parts.values()
        for at in range(0, len(part.tokens), CHUNK)
    )


def _documents(data: corpus.Corpus, parts: tuple[str, ...]) -> Iterator[pd.DataFrame]:
    import pyarrow.parquet

    for part in parts:
        start = 0
        with pyarrow.parquet.ParquetFile(data.folder / f"{part}.parquet") as file:
            for batch in file.iter_batches(ROWS, columns=["name", "bytes"]):
                frame = batch.to_pandas()
                frame["part"] = part
                frame["tokens"] = np.diff(data.parts[part].offsets[start : start + len(frame) + 1])
                start += len(frame)
                yield frame


def _held_out(data: corpus.Corpus) -> Iterator[pd.DataFrame]:
    """Documents that are not trained on, and whether one with the same tokens is."""
    held = {part: _digests(data.parts[part]) for part in PARTS[1:]}
    sought = {digest for digests in held.values() for digest in digests}
    found = sought.intersection(_digests(data.parts["train"]))
    start = dict.fromkeys(held, 0)
    for frame in _documents(data, PARTS[1:]):
        part = frame["part"].iloc[0]
        mine = held[part][start[part] : start[part] + len(frame)]
        start[part] += len(frame)
        frame["in_train"] = [int(digest in found) for digest in mine]
        yield frame


def _digests(part: corpus.Part) -> list[bytes]:
    return [hashlib.blake2b(part.of(document).tobytes(), digest_size=8).digest() for document in range(len(part))]


def _rejects(folder: Path) -> dict[str, list[dict[str, Any]]]:
    import pyarrow.parquet

    found: dict[str, list[dict[str, Any]]] = {}
    for row in pyarrow.parquet.read_table(folder / "rejects.parquet").to_pylist():
        rows = found.setdefault(row["reason"], [])
        if len(rows) < MAX_ROWS:
            rows.append(row)
    return found


def stability(alphabet: npt.NDArray[np.int64], before: Mapping[str, Any]) -> tuple[Floats, Floats, Floats]:
    """Population stability index of the texts' bytes, byte by byte; the index is the sum of the parts.

    Bytes and not tokens, because a tokenizer that was trained on other texts has other tokens.

    Returns: shares before, shares now, and parts of the index, each [256].
    """
    then = np.asarray(before["alphabet"], np.float64)
    then, now = then / then.sum(), alphabet / max(alphabet.sum(), 1)
    p, q = np.maximum(now, FLOOR), np.maximum(then, FLOOR)
    return then, now, (p - q) * np.log(p / q)


def chapters(folder: Path, before: Mapping[str, Any] | None) -> list[Chapter]:
    """Show the texts of `folder`, alone and against the last accepted version."""
    data = corpus.load(folder)
    return [
        Chapter("What the data look like", [_parts(data), _lengths(data), _popularity(data)]),
        Chapter("Against the last accepted version", _drift(data, before)),
    ]


def _parts(data: corpus.Corpus) -> Table:
    rows = [
        (part, counts["documents"], counts["tokens"], counts["bytes"], counts["bytes"] / max(1, counts["tokens"]))
        for part, counts in data.meta["parts"].items()
    ]
    return Table("The parts", ("part", "documents", "tokens", "bytes", "bytes a token"), rows)


def _lengths(data: corpus.Corpus) -> Plot:
    lengths = np.concatenate([np.diff(part.offsets) for part in data.parts.values()])
    edges = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, 50))
    figure, axes = canvas("tokens of a document", "documents")
    axes.hist(lengths, bins=edges.tolist())
    axes.set_xscale("log")
    return Plot(f"How long the documents are: median {np.median(lengths):,.0f}, longest {lengths.max():,}", figure)


def _popularity(data: corpus.Corpus) -> Plot:
    counts = np.zeros(data.vocabulary, np.int64)
    tokens = data.parts["train"].tokens
    for at in range(0, len(tokens), CHUNK):
        chunk = np.minimum(tokens[at : at + CHUNK], data.vocabulary - 1)
        counts += np.bincount(chunk, minlength=data.vocabulary)
    counts = np.sort(counts)[::-1]
    ranks = np.unique(np.geomspace(1, len(counts), 300).astype(int))
    figure, axes = canvas("rank of the token", "times in train")
    axes.loglog(ranks, np.maximum(counts[ranks - 1], 0.5))
    return Plot(f"How often the tokens come: {int((counts == 0).sum()):,} of {len(counts):,} never do", figure)


def _drift(data: corpus.Corpus, before: Mapping[str, Any] | None) -> list[Note | Plot | Table]:
    if before is None:
        return [Note("No version of this source was accepted before: there is nothing to compare with.", "info")]
    then, now, parts = stability(_alphabet(data.folder), before)
    figure, axes = canvas("byte", "share")
    places = np.arange(len(parts))
    axes.plot(places, then, label="accepted before", color=PALETTE[5])
    axes.plot(places, now, label="now", color=PALETTE[0])
    axes.legend(frameon=False)
    widest = np.argsort(parts)[::-1][:5]
    rows = [[repr(bytes([place]))[1:], float(then[place]), float(now[place]), float(parts[place])] for place in widest]
    return [
        Note(f"{data.meta['tokens']:,} tokens now, {before['tokens']:,} before."),
        Plot(f"How the bytes' shares moved: stability index {parts.sum():.3f}", figure),
        Table("The bytes that moved most", ("byte", "share before", "share now", "part of the index"), rows),
    ]
