"""SASRec on Amazon Video Games against the published figures, through the pipeline's own training and export.

    python -m benchmarks.ranker PATH/TO/video_games.txt [--epochs 75]

Published: HR@10 .741, NDCG@10 .536 (100 sampled negatives, all users). Prints a
table and writes benchmarks/results/ranker.json. The full run takes about 10 minutes on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
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
NEEDED = {"hr_at_10_sampled": 0.69, "ndcg_at_10_sampled": 0.48}
MODEL = RankerParams(width=64, blocks=2, heads=1, max_length=50, dropout=0.5, negatives=256)
TRAIN = TrainParams(epochs=75, batch_size=128, learning_rate=0.004, world_size=2, zero=1)


def ingest(source: Path, folder: Path) -> None:
    """Write a table of `user item` rows, in time order, as the columns that training reads."""
    table = np.loadtxt(source, dtype=np.int64)
    users, user = np.unique(table[:, 0], return_inverse=True)
    items, item, events = np.unique(table[:, 1], return_inverse=True, return_counts=True)
    rank = np.lexsort((items, -events))
    ids = np.empty(len(items), np.int32)
    ids[rank] = np.arange(1, len(items) + 1)
    folder.mkdir(parents=True)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(np.bincount(user))]))
    np.save(folder / "items.npy", ids[item][np.argsort(user, kind="stable")])
    pq.write_table(pa.table({"key": users.astype(str)}), folder / "users.parquet")
    pq.write_table(pa.table({"key": items[rank].astype(str), "events": events[rank]}), folder / "items.parquet")
    about = {"source": source.name, "events": len(table), "users": len(users), "items": len(items)}
    artifacts.write_json(folder / "meta.json", about)


def main() -> None:
    """Train, export, score on all users, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="video_games.txt: `user item` a line, in time order")
    parser.add_argument("--epochs", type=int, default=TRAIN.epochs)
    parser.add_argument("--learning-rate", type=float, default=TRAIN.learning_rate)
    options = parser.parse_args()
    train = TRAIN.model_copy(update={"epochs": options.epochs, "learning_rate": options.learning_rate})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ingest(options.source, folder / "data")
        began = time.monotonic()
        state = loop.train(
            loop.Job("ranker", folder / "data", train, MODEL, folder / "checkpoints", folder / "trained")
        )
        seconds = time.monotonic() - began
        export = Export(folder / "data", folder / "trained")
        export.files(folder)
        samples = scoring.samples(folder / "data", "test", 0, 0)
        values = scoring.score(engine.load(export.fp32(), "fp32"), samples, folder)
    found = {name: round(float(value.mean()), 4) for name, value in values.items()}
    print(f"{'metric':24}{'slipway':>10}{'needed':>10}{'published':>11}")
    for name, value in found.items():
        print(f"{name:24}{value:10.4f}{NEEDED.get(name, '–'):>10}{PUBLISHED.get(name, '–'):>11}")  # noqa: RUF001
    print(f"{options.epochs} epochs, best {state.best.epoch}, {seconds:.0f} s, {len(samples):,} users")
    result = {"metrics": found, "needed": NEEDED, "published": PUBLISHED, "seconds": round(seconds, 1)}
    RESULT.parent.mkdir(exist_ok=True)
    curve = [asdict(point) for point in state.curve]
    RESULT.write_text(json.dumps({**result, "train": train.model_dump(), "curve": curve}, indent=2) + "\n")


if __name__ == "__main__":
    main()
