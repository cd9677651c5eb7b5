"""The trace of a few steps has the form that Perfetto and chrome://tracing read.

Checked against the Trace Event Format that both read: known phases, times in µs, and slices of a thread that lie inside
one another, because a viewer drops those that overlap in part.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from slipway.training import profile, watch

NEEDED = {"X": {"ts", "dur"}, "M": {"args"}, "i": {"ts", "s"}, "s": {"ts", "id"}, "f": {"ts", "id", "bp"}}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("trace") / "train.trace.json.gz"
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    with profile.recording(path) as stepped:
        for _ in range(profile.SKIPPED + profile.WARMUP + profile.RECORDED + 1):
            with watch.part("forward"):
                loss = net(torch.ones(4, 8)).sum()
            with watch.part("backward"):
                torch.autograd.backward(loss)
            stepped()
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left there"
    trace = json.loads(gzip.decompress(path.read_bytes()), parse_constant=pytest.fail)  # NaN is not JSON
    found: list[dict[str, Any]] = trace["traceEvents"]
    return found


def test_every_event_has_a_known_phase_and_what_that_phase_needs(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert event["ph"] in NEEDED, event
        assert {"name", "pid", "tid"} | NEEDED[event["ph"]] <= set(event), event
        assert math.isfinite(event.get("ts", 0)), event
        assert event.get("dur", 0) >= 0, event
    flows = Counter((event["ph"], event["id"]) for event in events if event["ph"] in "sf")
    assert flows
    assert all(flows[{"s": "f", "f": "s"}[phase], number] for phase, number in flows), "an arrow has both its ends"


def test_slices_of_a_thread_lie_inside_one_another_and_the_parts_of_a_step_hold_its_operations(
    events: list[dict[str, Any]],
) -> None:
    tracks: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    inside = Counter[tuple[str, str]]()
    for track in tracks.values():
        around: list[dict[str, Any]] = []
        for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            end = event["ts"] + event["dur"]
            assert not around or end <= around[-1]["ts"] + around[-1]["dur"] + 0.01, (event, around[-1])
            inside.update((each["name"], event["name"]) for each in around)
            around.append(event)
    assert inside["forward", "aten::addmm"] == 2 * profile.RECORDED, "two layers a step"
    assert inside["backward", "aten::mm"] > 0
