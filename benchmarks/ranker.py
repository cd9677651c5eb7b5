"""SASRec on Amazon Video Games against the published figures, through the pipeline's own training and export.

    python -m benchmarks.ranker PATH/TO/video_games.txt [--epochs 36] [--width 64] [--weight-decay 0.2] [--keep FOLDER]
        [--json FILE]

Published: HR@10 .741, NDCG@10 .536. Leave-one-out, as there: of each user the last item is the test, the one before
chooses the epoch, and the true item is ranked among 100 that the user has not had, drawn uniformly. That is done with
several draws, and the same answers are ranked among all items. Prints a table, writes FILE (results/ranker.json).
With --keep data, checkpoints and model stay in FOLDER, where a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slipway import artifacts
from slipway.compression import engine
from slipway.params import TrainParams
from slipway.training import loop
from slipway.workloads.ranker import scoring
from slipway.workloads.ranker.export import Export
from slipway.workloads.ranker.params import RankerParams

RESULT = Path(__file__).parent / "results" / "ranker.json"
PUBLISHED = {"hr_at_10_sampled": 0.741, "ndcg_at_10_sampled": 0.536}
DRAWS = 5  # of the negatives
MODEL = RankerParams(width=64, blocks=2, heads=1, max_length=50, dropout=0.5, negatives=256)
TRAIN = TrainParams(epochs=36, batch_size=128, learning_rate=0.004, weight_decay=0.2, world_size=2, zero=1)


def ingest(source: Path, folder: Path) -> None:
    """Write a table of `user item` rows, in time order, as the columns that training reads."""
    table = np.loadtxt(source, dtype=np.int64)
    users, user = np.unique(table[:, 0], return_inverse=True)
    items, item, events = np.unique(table[:, 1], return_inverse=True, return_counts=True)
    rank = np.lexsort((items, -events))
    ids = np.empty(len(items), np.int32)
    ids[rank] = np.arange(1, len(items) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(np.bincount(user))]))
    np.save(folder / "items.npy", ids[item][np.argsort(user, kind="stable")])
    pq.write_table(pa.table({"key": users.astype(str)}), folder / "users.parquet")
    pq.write_table(pa.table({"key": items[rank].astype(str), "events": events[rank]}), folder / "items.parquet")
    about = {"source": source.name, "events": len(table), "users": len(users), "items": len(items)}
    artifacts.write_json(folder / "meta.json", about)


def test(export: Export, folder: Path) -> dict[str, list[float]]:
    """Score the exported model on all users, once for each draw of negatives: means by metric."""
    export.files(folder)
    run, found = engine.load(export.fp32(), "fp32"), []
    for seed in range(DRAWS):
        values = scoring.score(run, scoring.samples(folder / "data", "test", 0, seed), folder)
        found.append({name: float(value.mean()) for name, value in values.items()})
    return {name: [each[name] for each in found] for name in found[0]}


def train(source: Path, folder: Path, params: TrainParams, model: RankerParams) -> loop.State:
    """Train in `folder`, or go on there."""
    if not (folder / "data").exists():
        with artifacts.writing(folder / "data") as data:
            ingest(source, data)
    return loop.train(loop.Job("ranker", folder / "data", params, model, folder / "checkpoints", folder / "trained"))


def main() -> None:
    """Train, export, score on all users, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="video_games.txt: `user item` a line, in time order")
    parser.add_argument("--epochs", type=int, default=TRAIN.epochs)
    parser.add_argument("--width", type=int, default=MODEL.width)
    parser.add_argument("--weight-decay", type=float, default=TRAIN.weight_decay)
    parser.add_argument("--processes", type=int, default=TRAIN.world_size, help="that share a step of 256 sequences")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where data, checkpoints and the model stay")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    shared = {"world_size": options.processes, "batch_size": TRAIN.batch_size * TRAIN.world_size // options.processes}
    turned = {"epochs": options.epochs, "weight_decay": options.weight_decay, **shared}
    params = TRAIN.model_copy(update=turned)
    model = MODEL.model_copy(update={"width": options.width})
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        state = train(options.source, folder, params, model)
        draws = test(Export(folder / "data", folder / "trained"), folder)
    found = {name: round(statistics.fmean(each), 4) for name, each in draws.items()}
    spread = {name: round(statistics.stdev(each), 4) for name, each in draws.items()}
    print(f"{'metric':24}{'slipway':>10}{'of draws ±':>12}{'published':>11}")
    for name, value in found.items():
        print(f"{name:24}{value:10.4f}{spread[name]:12.4f}{PUBLISHED.get(name, '–'):>11}")  # noqa: RUF001
    seconds = state.curve[-1].seconds
    print(f"{options.epochs} epochs, best {state.best.epoch}, {seconds:.0f} s")
    result = {"metrics": found, "spread": spread, "published": PUBLISHED, "best_epoch": state.best.epoch}
    curve = [asdict(point) for point in state.curve]
    told = {**result, "seconds": seconds, "model": model.model_dump(), "train": params.model_dump(), "curve": curve}
    artifacts.write_json(options.json, told)


if __name__ == "__main__":
    main()
