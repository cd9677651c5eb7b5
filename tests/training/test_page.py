"""The page of `train`, from the report of a run as it is and as fp16 and techniques make it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.training import page, watch


def report(**turned: Any) -> dict[str, Any]:
    curve = [
        {"epoch": epoch, "step": 10 * epoch, "loss": 3 / epoch, "metric": 0.1 * epoch, "figures": {"perplexity": 9.5}}
        for epoch in (1, 2, 3)
    ]
    sample = {
        "step": 1,
        "at_ms": 1,
        "seconds": 1.0,
        "loss": 3.0,
        "learning_rate": 0.1,
        "grad_norm": 2.0,
        "mfu": 0.25,
        "tokens_per_s": 1000.0,
        "rss_bytes": 1e9,
        "sent_bytes_per_step": 1e6,
        **{f"{name}_share": 0.1 for name in watch.PARTS},
    }
    return {
        "workload": "llm",
        "metric": "ndcg_at_10",
        "unit": "tokens",
        "best": curve[2],
        "curve": curve,
        "train_seconds": 125.0,
        "samples_per_s": 1000.0,
        "mfu": 0.25,
        "peak_flops_per_s": 1e11,
        "flops_per_step": 1e9,
        "time_share": {**dict.fromkeys(watch.PARTS, 0.125), "other": 0.125},
        "loss_scale": [],
        "history": [{**sample, "step": step} for step in range(1, 31)],
        **turned,
    }


def test_the_page_tells_what_was_learnt_and_what_it_took(tmp_path: Path) -> None:
    path = tmp_path / "train.html"
    page.write(path, report(), epochs=3)
    text = path.read_text()
    for told in ("NDCG@10", "perplexity", "0.3000", "2:05 min", "25.0%", "tokens a second", "waiting for batches"):
        assert told in text, told
    assert "Loss scale" not in text
    assert "Techniques" not in text
    assert "ended after" not in text
    page.write(tmp_path / "again.html", report(), epochs=3)
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_overflows_techniques_and_an_early_end_have_their_place(tmp_path: Path) -> None:
    scale = [
        {"step": 0, "scale": 32768.0, "overflow": False},
        {"step": 7, "scale": 16384.0, "overflow": True},
        {"step": 20, "scale": 32768.0, "overflow": False},
    ]
    history = report()["history"]
    history[20]["workers"] = 3.0
    path = tmp_path / "train.html"
    page.write(path, report(loss_scale=scale, history=history), epochs=50)
    text = path.read_text()
    assert "1 steps overflowed" not in text
    for told in ("one step overflowed and was skipped", "Techniques", "workers", "ended after 3 of 50 epochs"):
        assert told in text, told


def test_a_run_of_one_step_has_a_page(tmp_path: Path) -> None:
    one = report()
    page.write(tmp_path / "a.html", {**one, "history": one["history"][:1], "curve": one["curve"][:1]}, epochs=3)
    page.write(tmp_path / "b.html", {**one, "history": [], "curve": one["curve"][:1]}, epochs=3)
    assert "<svg" in (tmp_path / "b.html").read_text()
