from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slipway import package
from slipway.errors import ModelError
from slipway.package import TensorSpec


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / package.MODEL).write_bytes(b"graph")
    (tmp_path / "items.json").write_text('{"keys": []}')
    package.seal(
        tmp_path,
        "ranker",
        "int8",
        (TensorSpec("history", "int64", (None, None)),),
        (TensorSpec("items", "int64", (None, 10)),),
        ({"history": np.ones((1, 3), np.int64)}, {"items": np.zeros((1, 10), np.int64)}),
    )
    return tmp_path


def test_a_sealed_package_reads_back_as_it_was(sealed: Path) -> None:
    read = package.load(sealed)
    assert (read.workload, read.precision) == ("ranker", "int8")
    assert read.inputs == (TensorSpec("history", "int64", (None, None)),)
    inputs, outputs = read.golden()
    assert inputs["history"].tolist() == [[1, 1, 1]]
    assert outputs["items"].shape == (1, 10)


@pytest.mark.parametrize("name", [package.MODEL, package.GOLDEN, "items.json"])
def test_one_changed_byte_anywhere_is_refused_by_name(sealed: Path, name: str) -> None:
    data = bytearray((sealed / name).read_bytes())
    data[len(data) // 2] ^= 1
    (sealed / name).write_bytes(bytes(data))
    with pytest.raises(ModelError, match=f"{name}: corrupt"):
        package.load(sealed)


@pytest.mark.parametrize("name", [package.MODEL, package.GOLDEN, "items.json"])
def test_a_missing_file_is_refused_by_name(sealed: Path, name: str) -> None:
    (sealed / name).unlink()
    with pytest.raises(ModelError, match=f"{name}: missing"):
        package.load(sealed)


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"files": {}}', '{"files": [1], "workload": "x"}'])
def test_a_torn_manifest_is_no_package(sealed: Path, manifest: str) -> None:
    (sealed / package.MANIFEST).write_text(manifest)
    with pytest.raises(ModelError, match="not a model package"):
        package.load(sealed)


def test_a_folder_that_is_absent_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model package"):
        package.load(tmp_path / "gone")
