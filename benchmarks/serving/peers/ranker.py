"""The ranker as every peer serves it: the same ONNX file, one thread, the same answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

MAX_BATCH = 32


class Ranker:
    """Answers many requests in one run."""

    def __init__(self) -> None:
        folder = Path(os.environ["RANKER"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        known = json.loads((folder / "items.json").read_text())
        self._keys, self._length = known["keys"], known["max_length"]
        self._ids = {key: number for number, key in enumerate(self._keys, 1)}

    def answer(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pad, run and name."""
        rows = [[self._ids[key] for key in request["history"]][-self._length :] for request in requests]
        history = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for target, row in zip(history, rows, strict=True):
            target[-len(row) :] = row
        items, scores = self._session.run(["items", "scores"], {"history": history})
        answers = []
        for request, ids, values in zip(requests, items, scores, strict=True):
            ranked = zip(ids[: request["k"]].tolist(), values[: request["k"]].tolist(), strict=True)
            answers.append({"items": [{"item": self._keys[number - 1], "score": score} for number, score in ranked]})
        return answers
