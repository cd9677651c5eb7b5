"""The llm's data between stages: the tokens of all documents, part by part, mapped into memory, not read.

    PART.npy               uint16 or uint32 [N]  tokens; each document ends with the token `end`
    PART.offsets.npy       int64 [D+1]           document d of the part is offsets[d] .. offsets[d+1]
    PART.parquet           one row a document, in the order of the offsets: name, bytes, tokens, sha256 (of the text)
    rejects.parquet        documents that were left out: document (from 1), reason, name; the first 1000 a reason
    bytes.npy              int64 [256]           how often each byte occurs in the texts
    tokenizer.json         how texts are cut into tokens
    meta.json              source, documents, tokens, vocabulary, ...; written last

PART is train, validation and test.
"""

# N tokens, D documents
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.errors import DataError
from slipway.workloads.llm.tokenizer import TOKENIZER, Tokens

PARTS = ("train", "validation", "test")

Kind = np.uint16 | np.uint32


@dataclass(frozen=True)
class Part:
    """The documents of one part."""

    tokens: npt.NDArray[Kind]
    """[N]"""
    offsets: npt.NDArray[np.int64]
    """[D+1]"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, document: int) -> npt.NDArray[Kind]:
        """Tokens of one document (0..D-1), the end token included."""
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]


@dataclass(frozen=True)
class Corpus:
    """The columns of a folder that `ingest` wrote."""

    folder: Path
    parts: dict[str, Part]
    meta: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        """Number of tokens: ids run from 0 to one less."""
        return int(self.meta["vocabulary"])

    def tokenizer(self) -> Tokens:
        """What cut the texts into tokens."""
        return Tokens.load(self.folder / TOKENIZER)


def kind(vocabulary: int) -> type[Kind]:
    """Narrowest type that holds the ids of a vocabulary."""
    narrow, wide = get_args(Kind)
    chosen: type[Kind] = narrow if vocabulary <= 1 << 16 else wide
    return chosen


def load(folder: Path) -> Corpus:
    """Map the columns of `folder` into memory.

    Raises:
        DataError: a file is missing, torn, or does not fit the others; names it.
    """
    meta = artifacts.read_json(folder / "meta.json")
    parts = {}
    for name in PARTS:
        try:
            tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
            offsets = np.load(folder / f"{name}.offsets.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: torn or incomplete ({error}); run `python -m tasks.ingest` again") from error
        counted = meta.get("parts", {}).get(name, {})
        if len(offsets) != counted.get("documents", -1) + 1 or not len(tokens) == offsets[-1] == counted["tokens"]:
            raise DataError(f"{folder}: {name}.npy does not fit the others; run `python -m tasks.ingest` again")
        parts[name] = Part(tokens, offsets)
    return Corpus(folder, parts, meta)
