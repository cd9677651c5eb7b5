"""A classifier from scratch within half an hour: a folder of photographs through ingest, training and export.

    python -m benchmarks.classifier PATH/TO/clothing [--epochs 100] [--json FILE]

Top-1 is that of the exported model on the pictures that the source holds out; the epoch was chosen on others, taken out
of its training part. The baseline is to name the commonest class. The full run takes some 20 minutes on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.claims import Claim, tell
from slipway import artifacts, config
from slipway.compression import engine
from slipway.params import TrainParams
from slipway.training import loop
from slipway.workloads.classifier import images, scoring
from slipway.workloads.classifier.export import Export
from slipway.workloads.classifier.ingest import ingest
from slipway.workloads.classifier.params import AugmentParams, ClassifierParams

SIZE = 112
NEEDED, AIM, WITHIN_S = 0.75, 0.85, 1800.0
TRAIN = TrainParams(
    epochs=100, batch_size=16, learning_rate=0.002, weight_decay=0.05, precision="bf16", zero=0, world_size=2
)
MODEL = ClassifierParams(
    width=32,
    blocks=(2, 2, 2, 2),
    dropout=0.2,
    smoothing=0.1,
    repeats=1,
    sides=(0.57, 0.86),
    augment=AugmentParams(smallest=0.35, mirror=True, turn=10.0, colour=0.3, cover=0.2, mix=0.5),
)


def main() -> None:
    """Read, train, export, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of class folders under train and validation")
    parser.add_argument("--epochs", type=int, default=TRAIN.epochs)
    parser.add_argument("--json", type=Path, help="file that the figures are written into")
    options = parser.parse_args()
    train = TRAIN.model_copy(update={"epochs": options.epochs})
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted = {"source": str(options.source), "images": {"image_size": SIZE}}
        with artifacts.writing(folder / "data") as beside:
            ingest(config.parse({"workload": "classifier", "ingest": wanted}), beside, {})
        state = loop.train(
            loop.Job("classifier", folder / "data", train, MODEL, folder / "checkpoints", folder / "trained")
        )
        export = Export(folder / "data", folder / "trained")
        export.files(folder)
        samples = scoring.samples(folder / "data", "test", 0, 0)
        values = scoring.score(engine.load(export.fp32(), "fp32"), samples, folder)
        seconds = time.monotonic() - began
        data = images.load(folder / "data")
        commonest = np.bincount(data.labels[data.of("train")]).argmax()
        baseline = float((samples.labels == commonest).mean())
    top1, top5 = (float(values[name].mean()) for name in ("top1", "top5"))
    print(
        f"best epoch {state.best.epoch} of {len(state.curve)}: {state.best.metric:.4f} on validation; top-5 {top5:.4f}"
    )
    reached = top1 >= NEEDED and seconds <= WITHIN_S
    ours = f"{top1:.3f} in {seconds / 60:.1f} min"
    claim = f"top-1 from scratch on {len(samples)} held-out pictures"
    published = f"{NEEDED} in 30 min (aim {AIM})"
    row = Claim(claim, published, f"{baseline:.3f}: the commonest class", ours, top1 / baseline, reached)
    tell("the classifier", "python -m benchmarks.classifier FOLDER", [row], options.json)


if __name__ == "__main__":
    main()
