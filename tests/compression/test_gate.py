"""The gate of INT8, and what a torn model gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipway.compression import engine, gate
from slipway.config import CompressParams
from slipway.errors import ModelError
from slipway.workloads.ranker.export import Export
from slipway.workloads.ranker.params import RankerParams
from tests.ranker import data

LIMITS = CompressParams(max_drop=0.02, min_speedup=1.1)


@pytest.mark.parametrize(
    ("int8_metric", "int8_ms", "precision", "reason"),
    [
        (0.495, 0.5, "int8", "faster"),
        (0.48, 0.5, "fp32", "compress.max_drop"),
        (0.5, 0.95, "fp32", "compress.min_speedup"),
    ],
)
def test_int8_is_served_only_if_it_costs_little_and_gains_enough(
    int8_metric: float, int8_ms: float, precision: str, reason: str
) -> None:
    metric, latency = {"fp32": 0.5, "int8": int8_metric}, {"fp32": {1: 1.0, 8: 2.0}, "int8": {1: int8_ms, 8: 1.0}}
    decision = gate.decide(metric, latency, LIMITS)
    assert decision.precision == precision
    assert reason in decision.reason


def test_a_model_of_which_half_is_missing_is_named_and_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fp32\.onnx"):
        engine.load(b"half a model", "fp32.onnx")
    folder = data.write(tmp_path / "data", [[1, 2, 3, 4]])
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "model.json").write_text(RankerParams(width=8).model_dump_json())
    weights: Any = {"item.weight": np.zeros((9, 8), np.float32)}
    np.savez(trained / "weights.npz", **weights)
    with pytest.raises(ModelError, match="made from other data"):
        Export(folder, trained)
    (trained / "weights.npz").write_bytes((trained / "weights.npz").read_bytes()[:100])
    with pytest.raises(ModelError, match=r"weights\.npz: torn"):
        Export(folder, trained)
