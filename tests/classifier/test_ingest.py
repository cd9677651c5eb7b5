from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slipway import artifacts
from slipway.errors import DataError, TransientError
from slipway.workloads.classifier import images, reading, sources
from slipway.workloads.classifier.decoding import Limits
from slipway.workloads.classifier.reading import Reader, Seen
from slipway.workloads.classifier.sources import Entry
from tests.classifier import data
from tests.conftest import ROOT, until, working_in

CLASSES = {"cat": 40, "dog": 30, "tree": 20}
CLOTHING = ROOT.parent / "shared/data/clothing"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.folder(tmp_path_factory.mktemp("pictures") / "source", CLASSES)


@pytest.fixture(scope="module")
def ingested(source: Path, tmp_path_factory: pytest.TempPathFactory) -> images.Images:
    return data.read(data.params(source), tmp_path_factory.mktemp("ingested") / "out")


def test_every_picture_comes_back_with_its_label_its_pixels_and_its_file(ingested: images.Images, source: Path) -> None:
    assert ingested.classes == ("cat", "dog", "tree")
    assert len(ingested) == 90
    assert ingested.image_size == 32
    assert ingested.stored_size == 36
    everything = np.arange(len(ingested))
    pixels = ingested.pixels(everything)
    assert pixels.shape == (90, 36, 36, 3)
    for at in everything.tolist():
        path = source / ingested.names[at]
        assert path.parent.name == ingested.classes[ingested.labels[at]]
        assert ingested.original(at) == path.read_bytes()
        assert ingested.hashes[at] == hashlib.sha256(path.read_bytes()).hexdigest()
        with Image.open(path) as image:
            expected = np.asarray(image.resize((36, 36), Image.Resampling.BILINEAR), np.float64)
        assert np.abs(pixels[at] - expected).mean() < 3, ingested.names[at]
    assert (ingested.pixels([5, 2, 5]) == pixels[[5, 2, 5]]).all()


def test_every_picture_is_in_one_part_and_stays_there_when_others_come(
    ingested: images.Images, source: Path, tmp_path: Path
) -> None:
    parts = [ingested.of(part) for part in images.PARTS]
    assert sorted(np.concatenate(parts).tolist()) == list(range(90))
    assert [len(part) > 0 for part in parts] == [True] * 3
    assert len(parts[0]) > 55
    shutil.copytree(source, tmp_path / "more")
    data.folder(tmp_path / "more", {"zebra": 15}, first=1000)
    more = data.read(data.params(tmp_path / "more"), tmp_path / "out")
    before, after = (dict(zip(one.hashes, one.split.tolist(), strict=True)) for one in (ingested, more))
    assert len(after) == 105
    assert {digest: after[digest] for digest in before} == before


def test_the_same_source_gives_the_same_bytes_whoever_reads_it(
    ingested: images.Images, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FEW", 50)  # so that a second process is worth its start
    data.read(data.params(source), tmp_path / "out")
    for path in sorted(ingested.folder.iterdir()):
        assert artifacts.sha256(path) == artifacts.sha256(tmp_path / "out" / path.name), path.name


def test_many_pictures_go_to_several_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipway.workloads.classifier import ingest

    monkeypatch.setattr(ingest, "SHARD_BYTES", 36 * 36 * 3 * 32)
    read = data.read(data.params(source), tmp_path / "out")
    assert [len(shard) for shard in read.shards] == [32, 32, 26]
    assert read.original(80) == (source / read.names[80]).read_bytes()
    with Image.open(source / read.names[80]) as image:
        expected = np.asarray(image.resize((36, 36), Image.Resampling.BILINEAR), np.float64)
    assert np.abs(read.pixels([80])[0] - expected).mean() < 3


def test_what_a_source_holds_out_is_the_test_part_and_validation_comes_from_train(tmp_path: Path) -> None:
    root = data.folder(tmp_path / "two", {"train/a": 60, "train/b": 60, "val/a": 5, "val/b": 6})
    read = data.read(data.params(root), tmp_path / "out")
    assert {read.names[at].split("/")[0] for at in read.of("test")} == {"val"}
    assert len(read.of("test")) == 11
    assert 0 < len(read.of("validation")) < 30
    assert {read.names[at].split("/")[0] for at in read.of("validation")} == {"train"}


def test_a_source_that_parts_its_pictures_into_three_is_believed(tmp_path: Path) -> None:
    wanted = {"Train/a": 5, "Train/b": 5, "valid/a": 3, "valid/b": 1, "TEST/a": 2, "TEST/b": 2}
    read = data.read(data.params(data.folder(tmp_path / "three", wanted)), tmp_path / "out")
    assert [len(read.of(part)) for part in images.PARTS] == [10, 4, 4]
    assert {read.names[at].split("/")[0] for at in read.of("validation")} == {"valid"}


def test_hidden_files_links_out_and_strays_are_passed_over(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "source"
    shutil.copytree(source, root)
    data.folder(tmp_path / "elsewhere", {"x": 1}, first=500)
    (root / "cat/link.jpg").symlink_to(tmp_path / "elsewhere/x/000.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere/x")
    (root / "dog/ring.jpg").symlink_to(root / "dog/ring.jpg")
    (root / "cat/.hidden.jpg").write_bytes(b"not read")
    (root / ".git").mkdir()
    (root / "LICENSE").write_text("free")
    data.picture(600).save(root / "cat/inner.jpg")
    (root / "dog/inside.jpg").symlink_to(root / "cat/inner.jpg")
    read = data.read(data.params(root), tmp_path / "out")
    assert read.meta["passed_over"] == {"outside_of_classes": 1, "not_a_file": 2}
    assert read.meta["files"] == 92
    assert read.meta["dropped"]["conflict"] == 2, "one picture in two classes"


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_an_archive_is_read_as_its_folder_is(
    ingested: images.Images, source: Path, tmp_path: Path, ending: str
) -> None:
    archive = tmp_path / f"pictures.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in sorted(source.rglob("*.jpg")):
                zipped.write(path, "top" / path.relative_to(source))
            zipped.writestr("../outside/cat/x.jpg", b"no")
            zipped.writestr("__MACOSX/._x", b"no")
    else:
        with tarfile.open(archive, "w:gz" if ending == "tar.gz" else "w:") as tarred:
            tarred.add(source, "top")
            link = tarfile.TarInfo("top/cat/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tarred.addfile(link)
    where = str(archive) if ending != "tar.gz" else archive.as_uri()
    read = data.read(data.params(where), tmp_path / "out")
    assert read.names == ingested.names
    assert read.hashes == ingested.hashes
    assert not (tmp_path / "outside").exists()
    assert not [path for path in read.folder.iterdir() if path.is_dir()], "the unpacked archive was left"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such folder, and no archive .* set ingest.source"),
        ("empty", "no file in a class folder; set ingest.source"),
        ("broken.zip", "broken.zip: the archive is broken"),
        ("file:///nowhere/pictures.zip", "no such file"),
        ("https://example.org/page", "a URL has to name an archive"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(DataError, match=message):
        data.read(data.params(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("faulty", [0, 3])
def test_too_few_pictures_are_refused(tmp_path: Path, faulty: int) -> None:
    root = data.folder(tmp_path / "source", {"a": 0 if faulty else 1, "b": 0 if faulty else 1})
    for number in range(faulty):
        (root / f"a/{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none is left for"):
        data.read(data.params(root), tmp_path / "out")


def test_the_embedded_data_are_the_handwritten_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = sources.find("embedded", Path("data/.work"), 1000)  # where the stage has them
    assert len(source.entries) == 1797
    assert {entry.label for entry in source.entries} == set("0123456789")
    with Image.open(source.root / source.entries[0].name) as image:
        assert (image.size, image.mode) == ((8, 8), "L")


def test_torn_columns_are_named(source: Path, tmp_path: Path) -> None:
    read = data.read(data.params(source), tmp_path / "out")
    np.save(read.folder / "labels.npy", np.zeros(3, np.int64))
    with pytest.raises(DataError, match="labels.npy has 3 rows, not 90"):
        images.load(read.folder)
    (read.folder / "pixels-00000.npy").unlink()
    with pytest.raises(DataError, match="torn or incomplete"):
        images.load(read.folder)


def test_an_ingest_that_is_killed_leaves_no_process_and_can_be_run_again(tmp_path: Path) -> None:
    root = data.folder(tmp_path / "source", {"b": 220})
    (root / "a").mkdir()
    for number in range(40):  # slow to read, so that the first are written long before the last is read
        data.picture(1000 + number, 1200, 900).save(root / f"a/large{number}.jpg")
    (tmp_path / "params.yaml").write_text(
        f"workload: classifier\ningest: {{source: {root}, images: {{image_size: 32}}}}\n"
    )
    command = [sys.executable, "-m", "tasks.ingest"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "SLIPWAY_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    until(lambda: any(tmp_path.glob("data/.ingest.*/pixels-00000.npy")))  # it began to write
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not working_in(tmp_path))  # its readers ended with it
    assert not (tmp_path / "data/ingest").exists()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert images.load(tmp_path / "data/ingest").meta["contents"] == 260
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ingest"]


class Dying(Reader):
    """A reader that a decoder takes down with it."""

    def read(self, entries: Sequence[Entry]) -> list[Seen]:
        if any(entry.name == "a/020.jpg" for entry in entries):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(entries)


def test_a_file_that_kills_its_reader_is_named(tmp_path: Path) -> None:
    source = sources.find(str(data.folder(tmp_path / "source", {"a": 40, "b": 1})), tmp_path, 1_000_000)
    reader = Dying(source.root, 36, Limits(1_000_000, 1_000_000, 8))
    with pytest.raises(TransientError, match=r"between a/0\d\d.jpg and .* or a file that crashes the decoder"):
        list(reading.read(reader, source.entries, processes=2))


def test_a_name_that_is_no_utf_8_is_read_and_written_as_near_as_can_be(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    data.picture(700).save(os.fsdecode(bytes(tmp_path / "source/cat") + b"/caf\xe9.jpg"))
    read = data.read(data.params(tmp_path / "source"), tmp_path / "out")
    assert "cat/caf\ufffd.jpg" in read.names
    assert len(read) == 91


@pytest.mark.skipif(not CLOTHING.exists(), reason=f"needs the photos in {CLOTHING}")
def test_real_photos_are_read_whole(tmp_path: Path) -> None:
    read = data.read(data.params(CLOTHING, image_size="auto"), tmp_path / "out")
    assert read.meta["files"] == 3409
    assert sum(read.meta["faults"].values()) == 0
    assert (read.image_size, read.stored_size, len(read.classes)) == (160, 180, 10)
    assert len(read.of("test")) == 341
