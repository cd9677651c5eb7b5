"""Time to quality of the ranker on 2 cores, against RecTools' SASRec side by side.

    python -m benchmarks.time_to_quality PATH/TO/video_games.txt --rectools PYTHON [--minutes 5] [--json FILE]

PYTHON is an interpreter that has `rectools[torch]`. Both train on the same events (each user's last two are held out)
and are judged by NDCG@10 over all items on the same 4,096 validation users; the time of judging is left out of both.
RecTools trains with its own recommended settings (its defaults: width 256, full softmax), and once more in the cheapest
way that it offers (width and length as ours, one negative); each for so many minutes at most. Told is the time in which
slipway reaches the best value that RecTools reached, and how much sooner that is than RecTools' own first time there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import claims, ranker
from benchmarks.claims import Claim
from slipway.training import loop
from slipway.workloads.ranker.sequences import padded
from slipway.workloads.ranker.training import RankerTask
from slipway.workloads.ranker.windows import HELD_OUT

SCRIPT = Path(__file__).with_name("rectools_sasrec.py")
RESULT = Path(__file__).parent / "results" / "time_to_quality.json"
PEERS: Mapping[str, Mapping[str, Any]] = {
    "RecTools, recommended settings": {},
    "RecTools, cheapest settings": {
        "n_factors": ranker.MODEL.width,
        "n_heads": ranker.MODEL.heads,
        "session_max_len": ranker.MODEL.max_length,
        "loss": "BCE",
        "n_negatives": 1,
    },
}
SOONER = 3.0
Curve = list[dict[str, float]]


def claims_of(curves: Mapping[str, Curve], ours: Curve) -> list[Claim]:
    """Compare our curve with that of each peer."""
    made = []
    for name, curve in curves.items():
        best = max(curve, key=lambda point: point["ndcg"])
        there = next((point for point in ours if point["ndcg"] >= best["ndcg"]), None)
        ratio = best["seconds"] / there["seconds"] if there else 0.0
        found = f"{there['ndcg']:.4f} in {there['seconds']:.0f} s" if there else f"{ours[-1]['ndcg']:.4f}: not reached"
        peer = f"{best['ndcg']:.4f} in {best['seconds']:.0f} s ({best['epochs']:.1f} epochs)"
        claim = f"time to NDCG@10 (full ranking): {name}"
        made.append(Claim(claim, f"{SOONER:g} x sooner", peer, found, round(ratio, 2), ratio >= SOONER))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="video_games.txt: `user item` a line, in time order")
    parser.add_argument("--rectools", type=Path, required=True, metavar="PYTHON", help="with rectools[torch]")
    parser.add_argument("--minutes", type=float, default=5.0, help="longest training of RecTools, for each setting")
    parser.add_argument("--every", type=float, default=15.0, help="seconds of training between RecTools' evaluations")
    parser.add_argument("--epochs", type=int, default=12, help="passes of our training")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ranker.ingest(options.source, folder / "data")
        ours = _ours(folder, options.epochs)
        _events(folder)
        curves = {name: _peer(name, folder, options) for name in PEERS}
    made = claims_of(curves, ours)
    command = f"python -m benchmarks.time_to_quality video_games.txt --minutes {options.minutes:g}"
    claims.tell("time to quality", command, made, options.json)
    told = {**json.loads(options.json.read_text()), "load_before": load, "ours": ours, "peers": curves}
    options.json.write_text(json.dumps(told, indent=2) + "\n")


def _ours(folder: Path, epochs: int) -> Curve:
    train = ranker.TRAIN.model_copy(update={"epochs": epochs, "weight_decay": 0.0})  # as few epochs overfit little
    job = loop.Job("ranker", folder / "data", train, ranker.MODEL, folder / "checkpoints", folder / "trained")
    state = loop.train(job)
    working = 1 - state.figures["time_share"]["validation"]
    return [{"seconds": round(p.seconds * working, 2), "epochs": p.epoch, "ndcg": p.metric} for p in state.curve]


def _events(folder: Path) -> None:
    """Write what RecTools reads: the events that we train on, and the users that we validate on."""
    task = RankerTask(folder / "data", ranker.TRAIN, ranker.MODEL)
    offsets, items = np.asarray(task.data.offsets), np.asarray(task.data.items).astype(np.int64)
    kept = np.maximum(np.diff(offsets) - HELD_OUT, 0)
    user = np.repeat(np.arange(len(kept)), kept)
    at = offsets[user] + np.arange(len(user)) - np.repeat(np.cumsum(kept) - kept, kept)
    users = task.validation
    end = offsets[users + 1] - HELD_OUT
    history = padded(items, offsets[users], end, ranker.MODEL.max_length)
    np.savez(folder / "events.npz", user=user, item=items[at], history=history, truth=items[end])


def _peer(name: str, folder: Path, options: argparse.Namespace) -> Curve:
    print(name)
    told = folder / "peer.json"
    command = [options.rectools, SCRIPT, folder / "events.npz", options.minutes, options.every, told]
    subprocess.run([*map(str, command), json.dumps(PEERS[name])], check=True)
    curve: Curve = json.loads(told.read_text())
    return curve


if __name__ == "__main__":
    main()
