"""Small texts, and ingested folders of them, for tests that start behind `ingest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slipway import artifacts, config, trained
from slipway.params import Params
from slipway.workloads.llm import corpus
from slipway.workloads.llm.export import Export
from slipway.workloads.llm.ingest import ingest
from slipway.workloads.llm.model import LanguageModel, describe

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "tree")


def texts(count: int = 120, words: int = 60, seed: int = 0) -> list[str]:
    """Texts in which every word is followed by the next of the list, mostly: a rule that a model can learn."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        at, found = int(rng.integers(len(WORDS))), []
        for _ in range(words):
            at = int(rng.integers(len(WORDS))) if rng.random() < 0.1 else (at + 1) % len(WORDS)
            found.append(WORDS[at])
        made.append(" ".join(found) + ".\n")
    return made


def folder(path: Path, written: list[str] | None = None) -> Path:
    """Write each text into a file of its own."""
    path.mkdir(parents=True)
    for number, text in enumerate(texts() if written is None else written):
        (path / f"{number:04d}.txt").write_text(text)
    return path


def params(source: Path | str, vocabulary: int = 300, **more: Any) -> Params:
    tokenizer = {"vocabulary": vocabulary, **more.pop("tokenizer", {})}
    return config.parse({"workload": "llm", "ingest": {"source": str(source), "tokenizer": tokenizer}, **more})


def read(given: Params, out: Path) -> corpus.Corpus:
    """Ingest and load what came of it."""
    with artifacts.writing(out) as beside:
        ingest(given, beside, {})
    return corpus.load(out)


def export(model: LanguageModel, held: corpus.Corpus, trained_in: Path, context_length: int) -> Export:
    """Write a model as `train` does, and load it as `compress` does."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    about = {**describe(model.config), "context_length": context_length, "end": held.meta["end"]}
    trained.write(trained_in, "llm", weights, about)
    return Export(held.folder, trained_in)
