from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway import artifacts
from slipway.errors import DataError
from slipway.workloads.llm import corpus, sources
from slipway.workloads.llm.ingest import held_out
from slipway.workloads.llm.tokenizer import Tokens
from tests.llm import data


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    place = tmp_path_factory.mktemp("corpus")
    return data.read(data.params(data.folder(place / "texts")), place / "out")


def test_every_text_comes_back_from_its_tokens_in_one_of_the_parts(ingested: corpus.Corpus) -> None:
    tokens, found = ingested.tokenizer(), []
    for part in ingested.parts.values():
        for document in range(len(part)):
            *ids, last = part.of(document).tolist()
            assert last == tokens.end
            found.append(tokens.text(ids))
    assert collections.Counter(found) == collections.Counter(data.texts())
    assert [len(part) > 0 for part in ingested.parts.values()] == [True] * 3
    assert len(ingested.parts["train"]) > 80


def test_the_same_source_gives_the_same_bytes_and_tokens_take_two_bytes(
    ingested: corpus.Corpus, tmp_path: Path
) -> None:
    again = data.read(data.params(data.folder(tmp_path / "texts")), tmp_path / "out")
    for path in sorted(ingested.folder.glob("*.*")):
        if path.name != "meta.json":  # which holds the source's path
            assert artifacts.sha256(path) == artifacts.sha256(again.folder / path.name), path.name
    assert again.parts["train"].tokens.dtype == np.uint16
    assert isinstance(again.parts["train"].tokens, np.memmap)
    assert corpus.kind(70_000) is np.uint32


def test_what_is_empty_not_utf8_or_a_repetition_is_left_out_and_named(tmp_path: Path) -> None:
    folder = data.folder(tmp_path / "texts")
    (folder / "z-blank.txt").write_text(" \n\n")
    (folder / "z-latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "z-same.txt").write_text(data.texts()[3])
    (folder / ".hidden").write_text("not read")
    read = data.read(data.params(folder), tmp_path / "out")
    assert read.meta["dropped"] == {"empty": 1, "not_utf8": 1, "duplicate": 1}
    assert (read.meta["rows"], read.meta["documents"]) == (123, 120)
    rejects = pyarrow.parquet.read_table(read.folder / "rejects.parquet").to_pylist()
    assert [(row["reason"], row["name"]) for row in rejects] == [
        ("empty", "z-blank.txt"),
        ("not_utf8", "z-latin.txt"),
        ("duplicate", "z-same.txt"),
    ]


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=300),
    lines=st.integers(0, 2000),
    length=st.sampled_from([0, 40, 5000, 70_000]),
)
def test_the_pieces_of_a_long_file_are_the_file_and_break_no_character(
    tmp_path_factory: pytest.TempPathFactory, text: str, lines: int, length: int
) -> None:
    whole = ((text + "é" * length + "\n") * max(1, min(lines, 400_000 // (length + 50)))).encode()
    path = tmp_path_factory.mktemp("file") / "long.txt"
    path.write_bytes(whole)
    pieces = [document.data for document in sources.find(str(path)).documents()]
    assert b"".join(pieces) == whole
    assert max(map(len, pieces)) <= sources.LONGEST + 3
    for piece in pieces:
        piece.decode()


def test_one_long_file_is_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(data.texts(count=4000, words=100)))
    read = data.read(data.params(path), tmp_path / "out")
    table = pyarrow.parquet.read_table(read.folder / "train.parquet").to_pylist()
    assert {row["name"].split("#")[0] for row in table} == {"book.txt"}
    assert read.meta["bytes"] == path.stat().st_size


def test_a_given_tokenizer_is_used_as_it_is(ingested: corpus.Corpus, tmp_path: Path) -> None:
    other = data.folder(tmp_path / "texts", [f"{text} again" for text in data.texts()])
    read = data.read(data.params(other, tokenizer={"file": str(ingested.folder / "tokenizer.json")}), tmp_path / "out")
    assert read.vocabulary == ingested.vocabulary
    ids = read.parts["test"].of(0).tolist()
    assert read.tokenizer().text(ids[:-1]) == ingested.tokenizer().text(ids[:-1])


def test_the_embedded_data_are_the_library_s_own_source() -> None:
    source = sources.find("embedded")
    names = [path.relative_to(source.folder).as_posix() for path in source.files]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not any("site-packages" in name or "/test/" in name for name in names)


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["a few words"], "1 documents are too few"), ([], "holds no text"), (["", " "], "0 documents are too few")],
)
def test_too_little_text_is_refused(tmp_path: Path, texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.read(data.params(data.folder(tmp_path / "texts", texts)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_or_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder; set ingest.source"):
        data.read(data.params("nowhere"), tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = data.folder(tmp_path / "texts")
    with pytest.raises(DataError, match="no tokenizer that can be read"):
        data.read(data.params(folder, tokenizer={"file": str(tmp_path / "tokenizer.json")}), tmp_path / "out")


def test_a_torn_column_is_named(tmp_path: Path) -> None:
    read = data.read(data.params(data.folder(tmp_path / "texts")), tmp_path / "out")
    np.save(read.folder / "test.npy", np.zeros(3, np.uint16))
    with pytest.raises(DataError, match=r"test\.npy does not fit the others"):
        corpus.load(read.folder)


def test_a_tokenizer_cuts_any_text_and_gives_it_back() -> None:
    tokens = Tokens.train(iter(data.texts()), 300)
    for text in ("", "naïve 名 \x00\t\n", "x" * 500):
        (ids,) = tokens.encode([text])
        assert tokens.text(ids) == text
        assert tokens.end not in ids


def test_a_source_for_a_model_from_elsewhere_is_all_held_out_and_cut_by_its_tokenizer(tmp_path: Path) -> None:
    own = data.read(data.params(data.folder(tmp_path / "own")), tmp_path / "columns")
    data.folder(tmp_path / "other", ["three cats", "one dog", "Entirely other words"])
    held_out(data.params(tmp_path / "other"), own.folder, tmp_path / "held", {})
    found = corpus.load(tmp_path / "held")
    assert [len(found.parts[name]) for name in corpus.PARTS] == [0, 0, 3]
    text = own.tokenizer().text(found.parts["test"].tokens.tolist())
    assert all(each in text for each in ("three cats", "one dog", "Entirely other words"))
