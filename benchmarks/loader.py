"""The loader: how soon the first batch is there, what memory a large table takes, and what workers bring and cost.

    python -m benchmarks.loader PATH/TO/IMAGES [--json FILE]

PATH/TO/IMAGES is any folder with 100 JPEGs or more, at any depth. Two jobs:

- input-bound: JPEGs are decoded to 224 x 224 with Pillow; the accelerator is an emulated one that takes a set time a
  batch and leaves the processor alone (it sleeps). The fixed default is one worker.
- compute-bound: the ranker's own step (forward, backward, AdamW, one thread) on the processor; the fixed default is
  none, which is torch's, and batches made between the steps.

The table of 10 million rows is generated. The runs of a comparison take turns.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.claims import Claim, tell
from slipway import artifacts
from slipway.params import LoaderParams, TrainParams
from slipway.training import processes
from slipway.training.loader import Loader
from slipway.training.workers import Source, Worker
from slipway.workloads.base import Tensors
from slipway.workloads.ranker.params import RankerParams
from slipway.workloads.ranker.training import RankerTask

ROWS, SMALL_ROWS, ITEMS = 10_000_000, 2_500_000, 50_000
BATCH, SIDE = 16, 224
ROUNDS = 2
MODEL = RankerParams(width=64, blocks=2, heads=1, max_length=50, dropout=0.3, negatives=512)


@dataclass(frozen=True)
class Images(Sequence[Tensors]):
    """Decodes and shrinks JPEGs; endless, and the same in every epoch."""

    files: tuple[str, ...]

    def epoch(self, epoch: int, ranks: int) -> Sequence[Tensors]:
        """Give itself."""
        return self

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: Any) -> Any:
        names = [self.files[(index * BATCH + i) % len(self.files)] for i in range(BATCH)]
        return {"image_BHWC": np.stack([self._decoded(name) for name in names])}

    @staticmethod
    def _decoded(name: str) -> np.ndarray[Any, Any]:
        with Image.open(name) as image:
            return np.asarray(image.convert("RGB").resize((SIDE, SIDE)))


@dataclass(frozen=True)
class Blocks:
    """Hands out one array again and again: what is measured is its way to the rank."""

    megabytes: int

    def epoch(self, epoch: int, ranks: int) -> Sequence[Tensors]:
        """Give one array for every index."""
        array = np.ones((self.megabytes, 1 << 20), dtype=np.uint8)
        return _Same({"block": array})


@dataclass(frozen=True)
class _Same(Sequence[Tensors]):
    batch: Tensors

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: Any) -> Any:
        return self.batch


def _given(task: Source) -> Source:
    return task


def _pickled(pipe: Any, task: Source) -> None:
    batches = task.epoch(0, 1)
    while (index := pipe.recv()) is not None:
        pipe.send(batches[index])


def table(folder: Path, rows: int) -> None:
    """Write a table of `rows` events as a Parquet file and as the columns of ingest: about 9 events a user."""
    rng = np.random.default_rng(rows)
    lengths = np.minimum(3 + rng.geometric(1 / 6, size=rows // 8), 400)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    users = int(np.searchsorted(offsets, rows, "right")) - 1
    offsets = offsets[: users + 1]
    items = rng.integers(1, ITEMS + 1, size=int(offsets[-1])).astype(np.int32)
    folder.mkdir(parents=True)
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "items.npy", items)
    events = np.bincount(items, minlength=ITEMS + 1)[1:]
    pq.write_table(pa.table({"key": np.arange(ITEMS).astype(str), "events": events}), folder / "items.parquet")
    artifacts.write_json(folder / "meta.json", {"events": len(items), "users": users, "items": ITEMS})
    order = rng.permutation(len(items))
    user = np.repeat(np.arange(users), np.diff(offsets))[order]
    time_ = (np.arange(len(items)) - np.repeat(offsets[:-1], np.diff(offsets)))[order]
    pq.write_table(pa.table({"user": user, "item": items[order], "time": time_}), folder / "events.parquet")


def read_all(folder: Path) -> Tensors:
    """First batch the plain way: read the table, sort it, part it into histories, shuffle them, pad 64 of them."""
    rows = pq.read_table(folder / "events.parquet")
    user, item, when = (rows[name].to_numpy() for name in ("user", "item", "time"))
    order = np.lexsort((when, user))
    histories = np.split(item[order], np.flatnonzero(np.diff(user[order])) + 1)
    chosen = np.random.default_rng(1).permutation(len(histories))[:64]
    out = np.zeros((64, MODEL.max_length), dtype=np.int64)
    for row, at in zip(out, chosen, strict=True):
        history = histories[at][:-2][-MODEL.max_length :]
        row[len(row) - len(history) :] = history
    return {"history_BT": out}


def mapped(folder: Path) -> Tensors:
    """First batch of the ranker's task, from opening the folder on."""
    return RankerTask(folder, TrainParams(world_size=2), MODEL).epoch(0, 2)[0]


def seconds(work: Callable[[], Any]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most memory that Python and numpy held at once during one call; pages of mapped files are not theirs."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def first_batch_and_memory() -> list[Claim]:
    """First batch from a table of 10 million rows, and the memory that an epoch of it takes."""
    with tempfile.TemporaryDirectory() as temporary:
        large, small = Path(temporary, "large"), Path(temporary, "small")
        table(large, ROWS)
        table(small, SMALL_ROWS)
        pairs = [(seconds(lambda: read_all(large)), seconds(lambda: mapped(large))) for _ in range(ROUNDS)]
        plain, ours = map(min, zip(*pairs, strict=True))  # the files are in the page cache for both
        held_all = peak_bytes(lambda: read_all(large))
        held, held_small = (peak_bytes(lambda folder=folder: _epoch(folder)) for folder in (large, small))  # type: ignore[misc]
    return [
        Claim(
            "first batch, 10 million rows",
            "seconds to milliseconds",
            f"{plain:.2f} s (read and sorted)",
            f"{1000 * ours:.0f} ms",
            plain / ours,
            ours < 0.1 and plain > 1,
        ),
        Claim(
            "peak memory of an epoch, 10 million rows",
            "does not grow with the table (ours)",
            f"{held_all / 1e6:.0f} MB (read and sorted)",
            f"{held / 1e6:.1f} MB; 2.5 million rows: {held_small / 1e6:.1f} MB",
            held_all / held,
            held < 1.25 * held_small,
        ),
    ]


def _epoch(folder: Path) -> None:
    batches = RankerTask(folder, TrainParams(world_size=2), MODEL).epoch(0, 2)
    for index in range(0, len(batches), 64):
        batches[index]


def throughput(task: Source, step: Callable[[Tensors], None], workers: int | str, warm_s: float, run_s: float) -> float:
    """Batches/s through the loader after `warm_s`, over `run_s`."""
    params = LoaderParams.model_validate({"workers": workers})
    with Loader(functools.partial(_given, task), params) as loader:
        return _rate(loader.epoch(0, 1, task.epoch(0, 1), range(1 << 30)), step, warm_s, run_s)


def _rate(batches: Iterator[Tensors], step: Callable[[Tensors], None], warm_s: float, run_s: float) -> float:
    ready = time.perf_counter() + warm_s
    while time.perf_counter() < ready:
        step(next(batches))
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < run_s:
        step(next(batches))
        count += 1
    return count / passed


def input_bound(files: Sequence[Path], accelerator_s: float) -> Claim:
    """JPEG decoding for an emulated accelerator: workers by need against one worker."""
    task = Images(tuple(map(str, files)))

    def step(batch: Tensors) -> None:
        time.sleep(accelerator_s)  # the emulated accelerator

    pairs = [tuple(BATCH * throughput(task, step, w, 12.0, 8.0) for w in (1, "auto")) for _ in range(ROUNDS)]
    one, auto = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(auto / one for one, auto in pairs)
    return Claim(
        f"JPEG decoding, emulated accelerator of {1000 * accelerator_s:.0f} ms a batch of {BATCH}",
        "+25 % samples/s",
        f"{one:.0f} images/s (one worker)",
        f"{auto:.0f} images/s (auto)",
        ratio,
        ratio >= 1.25,
    )


def compute_bound() -> Claim:
    """The ranker's step on the processor: the loader with `auto` against batches made between the steps."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        table(Path(temporary, "data"), SMALL_ROWS)
        task = RankerTask(Path(temporary, "data"), TrainParams(world_size=2), MODEL)
        torch.manual_seed(1)
        model = task.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step(batch: Tensors) -> None:
            optimizer.zero_grad()
            model(**{name: torch.from_numpy(array) for name, array in batch.items()}).backward()
            optimizer.step()

        batches, pairs = task.epoch(0, 2), []
        for _ in range(5):
            between = _rate((batches[i % len(batches)] for i in itertools.count()), step, 0.5, 4.0)
            pairs.append((between, throughput(task, step, "auto", 0.5, 4.0)))
    between, auto = (64 * statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(auto / between for between, auto in pairs)
    return Claim(
        "the ranker, compute-bound",
        "no loss",
        f"{between:.0f} sequences/s (no worker)",
        f"{auto:.0f} sequences/s (auto)",
        ratio,
        ratio >= 0.98,
    )


def shared_memory(megabytes: int = 8, count: int = 60) -> Claim:
    """One worker's batches of some megabytes: through the loader's slots against pickled through a pipe."""
    task, took = Blocks(megabytes), []
    worker = Worker(functools.partial(_given, task))
    worker.start()
    context = multiprocessing.get_context("forkserver")
    pipe, other = context.Pipe()
    process = context.Process(target=_pickled, args=(other, task), daemon=True)
    process.start()

    def piped(index: int) -> Tensors:
        pipe.send(index)
        batch: Tensors = pipe.recv()
        return batch

    for way in (piped, lambda index: worker.batch(0, 1, index)):
        assert int(way(0)["block"].sum()) == megabytes << 20
    for _ in range(ROUNDS):
        for way in (piped, lambda index: worker.batch(0, 1, index)):
            took.append(seconds(lambda way=way: [way(index) for index in range(count)]) / count)  # type: ignore[misc]
    pipe.send(None)
    process.join()
    worker.close()
    pickled, shared = statistics.median(took[::2]), statistics.median(took[1::2])
    return Claim(
        f"a batch of {megabytes} MB from a worker to its rank",
        "no copy or pickling in the rank (ours)",
        f"{1000 * pickled:.2f} ms (pickled)",
        f"{1000 * shared:.2f} ms (shared memory)",
        pickled / shared,
        pickled / shared > 1,
    )


def claims(images: Path) -> list[Claim]:
    """Measure all of them; takes about 4 minutes."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([processes.HEAVY])
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})[:1000]
    return [*first_batch_and_memory(), shared_memory(), input_bound(files, 0.02), compute_bound()]


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with JPEGs, at any depth")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    tell("The loader", "python -m benchmarks.loader IMAGES", claims(options.images), options.json)


if __name__ == "__main__":
    main()
