"""RecTools' SASRec with a clock: what `benchmarks.time_to_quality` runs in an interpreter that has `rectools[torch]`.

    PYTHON rectools_sasrec.py EVENTS.npz MINUTES EVERY_S OUT.json SETTINGS

It trains for so many minutes, evaluation left out, and writes a curve: seconds in training, passes over the data, and
NDCG@10 over all items of the validation sample. EVENTS.npz has `user` and `item` [E] in time order, and for the sample
`history` [U, T] (item ids, padded with 0 on the left) and `truth` [U]. SETTINGS are arguments of SASRecModel as JSON.
It knows nothing of slipway.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

EPOCHS = 10_000  # the clock ends the training
BATCH = 256


class Clock(Callback):  # type: ignore[misc]  # where RecTools is not installed, its types are not known
    """Evaluates every so many seconds of training, and ends it in time."""

    def __init__(self, events: Any, minutes: float, every_s: float) -> None:
        self.events, self.limit_s, self.every_s = events, minutes * 60, every_s
        self.began = self.told = 0.0
        self.curve: list[dict[str, float]] = []

    def __deepcopy__(self, memo: Any) -> Clock:
        """Stay the one that `main` reads: RecTools trains with a copy of its trainer."""
        return self

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        """Evaluate when it is time, while the clock stands still."""
        now = time.perf_counter()
        spent = now - self.began
        done = spent >= self.limit_s
        if done or spent - self.told >= self.every_s:
            passes = trainer.global_step / trainer.num_training_batches
            self.curve.append({"seconds": round(spent, 2), "epochs": round(passes, 3), "ndcg": self._ndcg(module)})
            print(self.curve[-1], flush=True)
            self.told, self.began = spent, self.began + time.perf_counter() - now
        trainer.should_stop = done

    @torch.no_grad()
    def _ndcg(self, module: Any) -> float:
        module.eval()
        network, data = module.torch_model, module.data_preparator
        table = np.zeros(1 + max(int(self.events[name].max()) for name in ("item", "history", "truth")), np.int64)
        for item, at in data.item_id_map.to_internal.items():
            if isinstance(item, (int, np.integer)):
                table[item] = at
        items, total = network.item_model.get_all_embeddings(), 0.0
        for begin in range(0, len(self.events["truth"]), BATCH):
            history = torch.from_numpy(table[self.events["history"][begin : begin + BATCH]])
            truth = torch.from_numpy(table[self.events["truth"][begin : begin + BATCH]])[:, None]
            padded = torch.nn.functional.pad(history, (max(0, data.session_max_len - history.shape[1]), 0))
            logits = network.encode_sessions({"x": padded[:, -data.session_max_len :]}, items)[:, -1] @ items.T
            logits.scatter_(1, history, -torch.inf)[:, 0] = -torch.inf  # seen ones, and padding
            rank = (logits > logits.gather(1, truth)).sum(1)
            gain = torch.where((rank < 10) & (truth[:, 0] > 0), 1 / torch.log2(rank + 2.0), torch.tensor(0.0))
            total += float(gain.sum())
        module.train()
        return round(total / len(self.events["truth"]), 5)


def main() -> None:
    """Train and write the curve."""
    warnings.filterwarnings("ignore")
    source, minutes, every_s, out, settings = sys.argv[1:]
    events = dict(np.load(source))
    table = pd.DataFrame({Columns.User: events["user"], Columns.Item: events["item"]})
    table[Columns.Datetime] = pd.to_datetime(np.arange(len(table)), unit="s")
    table[Columns.Weight] = 1.0

    clock = Clock(events, float(minutes), float(every_s))

    def trainer() -> Trainer:
        quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
        return Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[clock], **quiet)

    SASRecModel(epochs=EPOCHS, get_trainer_func=trainer, **json.loads(settings)).fit(Dataset.construct(table))
    Path(out).write_text(json.dumps(clock.curve))


if __name__ == "__main__":
    main()
