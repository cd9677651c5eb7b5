"""The history of releases, `releases.jsonl` in the state folder: an event a line, for people and for a rollback.

A rollback has to know the version before the champion when the registry is down, so this history decides, and the
registry's aliases follow it.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slipway import config, tracking

Event = dict[str, Any]


def path() -> Path:
    """Where the record lies."""
    return config.home() / "releases.jsonl"


def append(event: str, workload: str, version: str, **told: Any) -> None:
    """Write one event down, on the disk when this returns."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event, "workload": workload, "version": version, **told})
    path().parent.mkdir(parents=True, exist_ok=True)
    with path().open("ab+") as stream:
        if end := stream.seek(0, os.SEEK_END):
            stream.seek(end - 1)
            if stream.read(1) != b"\n":  # a power cut tore the last line: it must not spoil this one
                stream.write(b"\n")
        stream.write(line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def events(workload: str) -> list[Event]:
    """Read the events of a workload, oldest first; torn lines are left out."""
    found = []
    for line in path().read_text().splitlines() if path().exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("workload") == workload:
            found.append(event)
    return found


def previous(workload: str) -> str | None:
    """Version that the last promotion replaced; None once that was rolled back, or in the beginning."""
    moves = [event for event in events(workload) if event["event"] in {"promote", "rollback"}]
    return moves[-1].get("replaced") if moves else None


def name_versions(workload: str, champion: str | None, previous: str | None) -> None:
    """Move the registry's aliases to what serves; the champion is no candidate any more."""
    tracking.set_alias(workload, "champion", champion)
    tracking.set_alias(workload, "previous", previous)
    if champion is not None and tracking.alias(workload, "candidate") == champion:
        tracking.set_alias(workload, "candidate", None)
