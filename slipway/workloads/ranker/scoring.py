"""How good an exported ranker is: held-out samples, metrics of each, slices, and examples to look at.

The last item of a user is the truth for `test`, the one before for `validation`; what comes before is the history. Over
all items the service's own answer is judged: the items it shows, so an item that a user already had is a miss. Beside
it stands the published way: the truth's rank among 100 items that the user has not had.
"""

# U samples, B batch, T time, K items shown, N negatives, I items
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipway import artifacts
from slipway.workloads.base import Array, Tensors, Unknown
from slipway.workloads.ranker import metrics, sequences
from slipway.workloads.ranker.sequences import padded

Ints = npt.NDArray[np.int64]
Run = Callable[[Sequence[str], Tensors], Sequence[Array]]

METRIC = "ndcg_at_10"
BATCH = 128
SHORT, POPULAR = 5, 0.1  # a short history has at most 5 items; the popular tenth of the items


@dataclass(frozen=True)
class Samples:
    """Held-out samples: positions of users and of the true next items in the columns."""

    data: sequences.Sequences
    users: Ints
    """[U]"""
    truth_at: Ints
    """[U] event that is to be predicted; the user's events before it are the history."""
    seed: int

    def __len__(self) -> int:
        return len(self.users)


def samples(data: Path, split: str, count: int, seed: int) -> Samples:
    """Draw held-out samples: `count` users at random, or all for 0; `split` is validation or test."""
    columns = sequences.load(data)
    offsets = np.asarray(columns.offsets)
    users = np.flatnonzero(np.diff(offsets) > 2)
    if count and count < len(users):
        users = np.sort(np.random.default_rng([seed, 4]).choice(users, count, replace=False))
    return Samples(columns, users, offsets[users + 1] - (1 if split == "test" else 2), seed)


def score(run: Run, chosen: Samples, package: Path, sampled: bool = True) -> dict[str, metrics.Floats]:
    """Score an exported model on each sample.

    Args:
        run: runs the model: names of outputs, inputs -> outputs.
        chosen: the samples.
        package: folder with the model's items.json; its ids may differ from those of the data.
        sampled: whether the metrics among sampled negatives are wanted.

    Returns:
        [U] for each metric: hr_at_10, ndcg_at_10 and, if wanted, the same with _sampled behind.
    """
    ids, longest = translation(chosen.data, package)
    full, among = np.empty(len(chosen), np.int64), np.empty(len(chosen), np.int64)
    length = chosen.truth_at - chosen.data.offsets[chosen.users]
    order = np.argsort(length, kind="stable")  # like lengths share a batch: less padding
    rng = np.random.default_rng([chosen.seed, 5])
    for at in range(0, len(order), BATCH):
        rows = order[at : at + BATCH]
        begin, end = chosen.data.offsets[chosen.users[rows]], chosen.truth_at[rows]
        history = ids[padded(chosen.data.items, begin, end, longest)]
        truth = ids[chosen.data.items[end]]
        outputs = run(["items", "logits"] if sampled else ["items"], {"history": left_aligned(history)})
        full[rows] = np.where(truth > 0, metrics.shown_ranks(outputs[0], truth), metrics.MISSED)
        if sampled:
            last = chosen.data.offsets[chosen.users[rows] + 1]
            negative = metrics.draw_negatives(rng, padded(chosen.data.items, begin, last), chosen.data.item_count)
            ranks = metrics.sampled_ranks(outputs[1], truth, ids[negative])
            among[rows] = np.where(truth > 0, ranks, metrics.MISSED)
    values = {"hr_at_10": metrics.hits(full), "ndcg_at_10": metrics.gains(full)}
    if sampled:
        values |= {"hr_at_10_sampled": metrics.hits(among), "ndcg_at_10_sampled": metrics.gains(among)}
    return values


def best(run: Run, chosen: Samples, package: Path, count: int = 10) -> Ints:
    """What the model shows for each sample: [U, count] item ids, the best first."""
    ids, longest = translation(chosen.data, package)
    begin = chosen.data.offsets[chosen.users]
    found = []
    for at in range(0, len(chosen), BATCH):
        rows = slice(at, at + BATCH)
        history = ids[padded(chosen.data.items, begin[rows], chosen.truth_at[rows], longest)]
        found.append(run(["items"], {"history": left_aligned(history)})[0][:, :count])
    return np.concatenate(found)


def translation(data: sequences.Sequences, package: Path) -> tuple[Ints, int]:
    """Ids of the data -> ids of the package (0: unknown to it) as [I+1], and the longest history it takes."""
    about = artifacts.read_json(package / "items.json")
    of = {key: at for at, key in enumerate(about["keys"], start=1)}
    return np.array([0, *(of.get(key, 0) for key in data.item_keys)], dtype=np.int64), about["max_length"]


def unknown(chosen: Samples, package: Path) -> list[Unknown]:
    """Items of the data that the model of `package` has never seen."""
    ids, _ = translation(chosen.data, package)
    missing = np.flatnonzero(ids[1:] == 0)
    if not len(missing):
        return []
    keys = chosen.data.item_keys
    return [Unknown("items", len(missing), chosen.data.item_count, tuple(keys[i] for i in missing[:5]))]


def left_aligned(history_BT: Ints) -> Ints:
    """Move unknown items (0) inside a history to its left, so that they become padding."""
    return np.take_along_axis(history_BT, np.argsort(history_BT != 0, axis=1, kind="stable"), 1)


def figures(means: Mapping[str, float]) -> dict[str, float]:
    """Nothing beside the metrics themselves."""
    return {}


def slices(chosen: Samples) -> dict[str, npt.NDArray[np.bool_]]:
    """Parts of the samples that are looked at alone: [U] masks."""
    length = chosen.truth_at - chosen.data.offsets[chosen.users]
    popular = chosen.data.items[chosen.truth_at] <= max(1, round(POPULAR * chosen.data.item_count))
    return {
        f"history of at most {SHORT}": length <= SHORT,
        f"history over {SHORT}": length > SHORT,
        "popular item (top 10 %)": popular,
        "rarer item": ~popular,
    }


def examples(run: Run, chosen: Samples, package: Path, count: int = 8) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of histories, what the model shows for them, and what came next."""
    ids, longest = translation(chosen.data, package)
    keys = ["", *artifacts.read_json(package / "items.json")["keys"]]
    rows = []
    for at in np.random.default_rng([chosen.seed, 6]).permutation(len(chosen))[:count]:
        begin, end = chosen.data.offsets[chosen.users[at]], chosen.truth_at[at]
        history = left_aligned(ids[chosen.data.items[max(begin, end - longest) : end]][None].astype(np.int64))
        shown = run(["items"], {"history": history})[0][0][:5]
        truth = chosen.data.item_keys[chosen.data.items[end] - 1]
        best = [f"✓ {keys[i]}" if keys[i] == truth else keys[i] for i in shown]
        past = [keys[i] for i in history[0][-6:]]
        rows.append([" → ".join(past), ", ".join(best), truth])
    return ["history (last 6)", "shown (best 5)", "came next"], rows
