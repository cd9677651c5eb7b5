"""What the live page shows, made of what Prometheus, the gateway and the history of releases tell. Pure functions.

All shares are 0..1 and all times are seconds unless a name says otherwise; None is "not known".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from slipway.params import Params
from slipway.prometheus import Line, Sample

TRACKS = ("champion", "canary")
SPAN_S, STEP_S = 300, 2
WEIGHT = "slipway_gateway_canary_weight"
LINES = f'{{__name__=~"track:requests:rate15s|track:request_seconds:p99|track:failed_requests:ratio15s|{WEIGHT}"}}'
VALUES = (
    '{__name__=~"version:.+|class:requests:rate15s|replica:requests:rate15s|cache:lookups:ratio15s|cache:lookup_seconds:mean15s'
    "|slipway_autoscaler_(replicas|limit_replicas|metric_.+)"
    '|slipway_gateway_pool_.+|slipway_queue_length|slipway_program_.+|process_resident_memory_bytes|up"}'
)
EVENTS = 4

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What was found out at one moment; what could not be is empty."""

    times: Sequence[int]
    """Moments of the lines (Unix time)."""
    lines: Sequence[Line] = ()
    values: Sequence[Sample] = ()
    alerts: Sequence[Mapping[str, Any]] = ()
    gateway: Mapping[str, Any] = field(default_factory=dict)
    """State in force, as its admin server tells it."""
    events: Sequence[Event] = ()
    """History of releases, oldest first."""
    at_work: str = ""
    """Who holds the lock of releases, such as "canary of version 4"."""
    problem: str = ""


def view(facts: Facts, params: Params) -> dict[str, Any]:
    """Everything that the page draws, as plain JSON."""
    routing = {
        "champion": facts.gateway.get("champion"),
        "canary": facts.gateway.get("canary"),
        "weight": facts.gateway.get("canary_weight", 0.0),
    }
    track_of = {routing[track]: track for track in TRACKS if routing[track]}
    return {
        "workload": params.workload,
        "problem": facts.problem,
        "slo": {"p99_ms": params.slo.p99_ms, "error_ratio": params.slo.max_error_ratio},
        "routing": routing,
        "times": facts.times,
        "tracks": _tracks(facts),
        "weight": _percent(_line(facts, WEIGHT)),
        "classes": {s.labels["class"]: _finite(s.value) for s in _of(facts, "class:requests:rate15s")},
        "replicas": _replicas(facts, track_of),
        "versions": _versions(facts, track_of),
        "cache": _cache(facts),
        "pools": _pools(facts),
        "scaling": _scaling(facts, routing["champion"]),
        "release": release(facts.events, routing, params.canary.step_weights, facts.at_work),
        "alerts": sorted(map(_alert, facts.alerts), key=lambda a: (a["state"] != "firing", a["severity"], a["name"])),
        "programs": _programs(facts),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _of(facts: Facts, name: str) -> Iterable[Sample]:
    return (sample for sample in facts.values if sample.name == name)


def _by(facts: Facts, name: str, label: str) -> dict[str, float | None]:
    return {s.labels[label]: _finite(s.value) for s in _of(facts, name) if label in s.labels}


def _line(facts: Facts, name: str, track: str | None = None) -> Sequence[float | None]:
    for line in facts.lines:
        if line.name == name and line.labels.get("track") == track:
            return line.values
    return [None] * len(facts.times)


def _percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else value * 100 for value in values]


def _tracks(facts: Facts) -> dict[str, Any]:
    """Lines of each track; the canary's are there as long as they hold a value."""
    found = {}
    for track in TRACKS:
        rate = _line(facts, "track:requests:rate15s", track)
        if track == "champion" or any(rate):
            p99 = _line(facts, "track:request_seconds:p99", track)
            found[track] = {
                "rate": rate,
                "p99_ms": [None if value is None else value * 1e3 for value in p99],
                "failed": _line(facts, "track:failed_requests:ratio15s", track),
            }
    return found


def _replicas(facts: Facts, track_of: Mapping[str, str]) -> list[dict[str, Any]]:
    at_gateway = facts.gateway.get("replicas", {})
    rates, queues, memory = (
        _by(facts, name, "replica")
        for name in ("replica:requests:rate15s", "slipway_queue_length", "process_resident_memory_bytes")
    )
    rows = []
    for sample in _of(facts, "up"):
        labels = sample.labels
        if labels.get("job") == "replicas":
            name, known = labels["replica"], at_gateway.get(labels["instance"], {})
            rows.append(
                {
                    "name": name,
                    "track": track_of.get(labels["version"]),
                    "up": sample.value == 1,
                    "ready": bool(known.get("ready")),
                    "in_flight": known.get("in_flight"),
                    "rate": rates.get(name),
                    "queue": queues.get(name),
                    "memory_bytes": memory.get(name),
                }
            )
    return sorted(rows, key=lambda row: (TRACKS.index(row["track"]) if row["track"] else len(TRACKS), row["name"]))


def _versions(facts: Facts, track_of: Mapping[str, str]) -> list[dict[str, Any]]:
    keys = {
        "queue_p99": "version:queue_seconds:p99",
        "engine_p99": "version:engine_seconds:p99",
        "batch": "version:batch_size:mean15s",
        "busy": "version:engine_busy:ratio15s",
        "drift": "version:score_drift:psi5m",
    }
    found = {key: _by(facts, name, "version") for key, name in keys.items()}
    found["hit"] = _by(facts, "version:hit:ratio10m", "shown_version")
    running = {s.labels["version"] for s in _of(facts, "up") if "version" in s.labels}
    ranked = sorted(running, key=lambda version: (TRACKS.index(track_of.get(version, "canary")), version))
    return [
        {"version": version, "track": track_of.get(version)} | {key: found[key].get(version) for key in found}
        for version in ranked
    ]


def _cache(facts: Facts) -> list[dict[str, Any]]:
    shares, seconds = (_by(facts, f"cache:{what}", "level") for what in ("lookups:ratio15s", "lookup_seconds:mean15s"))
    return [{"level": level, "share": share, "lookup_s": seconds.get(level)} for level, share in shares.items()]


def _pools(facts: Facts) -> list[dict[str, Any]]:
    weights, prices = (_by(facts, f"slipway_gateway_pool_{what}", "pool") for what in ("weight", "price_per_hour"))
    states = list(_of(facts, "slipway_gateway_pool_replicas"))
    return [
        {
            "name": name,
            "weight": weight,
            "ready": sum(s.value for s in states if s.labels["pool"] == name and s.labels["state"] == "ready"),
            "replicas": sum(s.value for s in states if s.labels["pool"] == name),
            "price_per_hour": prices.get(name),
        }
        for name, weight in weights.items()
    ]


def _scaling(facts: Facts, champion: str | None) -> dict[str, Any] | None:
    """What the autoscaler wants, and why; None: there is none, or it did not look yet."""
    wanted = _by(facts, "slipway_autoscaler_replicas", "version").get(champion or "")
    if wanted is None:
        return None
    bounds = _by(facts, "slipway_autoscaler_limit_replicas", "bound")
    ratios, asked = (_by(facts, f"slipway_autoscaler_metric_{what}", "metric") for what in ("ratio", "replicas"))
    most = max((value for value in asked.values() if value is not None), default=None)
    return {
        "wanted": wanted,
        "least": bounds.get("min"),
        "most": bounds.get("max"),
        "metrics": [
            {"name": name, "ratio": ratio, "asks": asked.get(name), "decides": asked.get(name) == most is not None}
            for name, ratio in ratios.items()
        ],
    }


def _programs(facts: Facts) -> list[dict[str, Any]]:
    memory = _by(facts, "slipway_program_memory_bytes", "program")
    return [
        {
            "name": sample.labels["program"],
            "up": sample.value == 1,
            "memory_bytes": memory.get(sample.labels["program"]),
        }
        for sample in _of(facts, "slipway_program_up")
    ]


def _alert(raw: Mapping[str, Any]) -> dict[str, Any]:
    labels, told = raw["labels"], raw.get("annotations", {})
    runbook = told.get("runbook", "").removeprefix("docs/runbooks/").removesuffix(".md")
    return {
        "name": labels["alertname"],
        "severity": labels.get("severity", ""),
        "state": raw["state"],
        "summary": told.get("summary", ""),
        "since": datetime.fromisoformat(raw["activeAt"].replace("Z", "+00:00")).timestamp(),
        "runbook": f"runbooks/{runbook}" if runbook else None,
    }


def release(
    events: Sequence[Event], routing: Mapping[str, Any], step_weights: Sequence[float], at_work: str
) -> dict[str, Any]:
    """The release under way, or the last one: its steps and what became of them.

    Args:
        events: history of the workload, oldest first.
        routing: champion, canary and weight in force.
        step_weights: share of users in each step of a canary.
        at_work: holder of the lock of releases, such as "canary of version 4"; empty: no step runs.
    """
    begins = [n for n, event in enumerate(events) if event["event"] == "deploy"]
    mine = list(events[begins[-1] :]) if begins else []
    names = ["deploy", *(f"{weight:.0%}" for weight in step_weights), "chaos", "promote"]
    states = _states(mine, routing, step_weights, at_work, names)
    return {
        "steps": [{"name": name, "state": states.get(name, "")} for name in names],
        "events": [_told(event) for event in reversed(events[-EVENTS:])],
        "now": f"{at_work} is at work" if at_work else _ended(mine, routing),
    }


def _states(
    mine: Sequence[Event], routing: Mapping[str, Any], weights: Sequence[float], at_work: str, names: Sequence[str]
) -> dict[str, str]:
    """What became of each step of the last release: done, now or failed; the others are still to come."""
    states: dict[str, str] = {}
    share = {f"{weight:.0%}": weight for weight in weights}
    kinds = {event["event"]: event for event in mine}
    reached = len(names) if "promote" in kinds else 1 if mine else 0
    verdict = kinds.get("canary", {}).get("verdict")
    if verdict == "advance":
        reached = max(reached, 1 + len(weights))
    states |= dict.fromkeys(names[:reached], "done")
    if routing["canary"] and verdict is None:
        states |= {name: "done" for name, weight in share.items() if weight < routing["weight"]}
        states |= {name: "now" for name, weight in share.items() if weight == routing["weight"]}
    if verdict == "rollback":
        failed = kinds["canary"].get("weight", weights[0] if weights else 0)
        states |= {n: "done" if w < failed else "failed" for n, w in share.items() if w <= failed}
    if "chaos" in kinds and "promote" not in kinds:
        states["chaos"] = "failed"
    step = at_work.split(" ")[0].replace("promotion", "promote")
    return states | ({step: "now"} if step in names else {})


def _ended(mine: Sequence[Event], routing: Mapping[str, Any]) -> str:
    if not mine:
        return ""
    if routing["canary"]:
        return f"version {routing['canary']} waits at {routing['weight']:.0%}"
    last = mine[-1]
    words = {"promote": "promoted", "end-canary": "ended", "rollback": "rolled back", "canary": "judged"}
    return f"version {mine[0]['version']}: {words.get(last['event'], last['event'])}"


def _told(event: Event) -> dict[str, str]:
    told = [event["event"], f"version {event['version']}"]
    told += [f"{key} {event[key]}" for key in ("verdict", "champion", "replaced", "rolled_back") if event.get(key)]
    if event.get("why"):
        told.append(str(event["why"]))
    moment = datetime.fromisoformat(event["time"]).astimezone()
    return {"time": f"{moment:%d.%m. %H:%M:%S}", "text": " · ".join(told)}
