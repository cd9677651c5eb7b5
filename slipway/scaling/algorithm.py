"""How many replicas there should be, as Kubernetes' HorizontalPodAutoscaler computes it: no clock, files or network.

Each metric proposes a number, the largest counts; then come the stabilisation windows, the limits on the speed, and the
bounds. Source: kubernetes.io, Horizontal Pod Autoscaling, "Algorithm details" and "Configurable scaling behavior";
where the text leaves a choice, the controller itself (kubernetes/pkg/controller/podautoscaler).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from slipway.scaling.policy import Policy, Rules

TOLERANCE = 0.1
"""A ratio so near to 1 changes nothing."""


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be now."""

    replicas: int
    reason: str
    """For people: which metric, and what held it back."""


@dataclass(frozen=True)
class Memory:
    """What earlier decisions leave to later ones."""

    proposals: tuple[tuple[float, int], ...] = ()
    """Moment (s) and replicas that the metrics asked for, before they were stabilised."""
    changes: tuple[tuple[float, int], ...] = ()
    """Moment (s) and replicas added (negative: taken away), once they were in force."""

    def changed(self, now: float, by: int) -> Memory:
        """Remember a change that is in force."""
        return replace(self, changes=(*self.changes, (now, by)))

    def _added(self, since: float) -> int:
        return sum(by for moment, by in self.changes if moment > since)


@dataclass(frozen=True)
class Reading:
    """One metric, and the number of replicas that it asks for."""

    name: str
    value: float | None
    """What is compared with the target; None: it could not be read."""
    target: float
    replicas: int | None
    """None: it could not be read."""


def by_replica(
    current: int, target: float, values: Mapping[str, float], everybody: Collection[str], unready: Collection[str] = ()
) -> int | None:
    """Replicas by a metric of each replica, whose mean should be `target`.

    Args:
        current: replicas that there should be now.
        target: wanted mean of the values.
        values: by replica; who told none is set aside.
        everybody: names of all replicas.
        unready: those that do not serve yet: what they tell counts for nothing, and scaling out they count as idle.

    Returns:
        The number asked for; None if no replica that is ready told a value.
    """
    told = {name: value for name, value in values.items() if name in everybody and name not in unready}
    if not told:
        return None
    missing = [name for name in everybody if name not in told and name not in unready]
    first = _mean(told.values()) / target
    late = list(unready) if first > 1 else []
    if not missing and not late:
        return current if _near(first) else math.ceil(_exact(first * len(told)))
    assumed = dict.fromkeys(missing, target) if first < 1 else dict.fromkeys([*missing, *late], 0.0)
    all_of_them = {**told, **assumed}
    ratio = _mean(all_of_them.values()) / target
    if _near(ratio) or (ratio > 1) != (first > 1):
        return current
    asked = math.ceil(_exact(ratio * len(all_of_them)))
    return current if (asked > current) != (ratio > 1) else asked


def by_value(current: int, ready: int, target: float, value: float) -> int:
    """Replicas by one number for all of them, which should be `target`; `ready` of them serve now."""
    ratio = value / target
    return current if _near(ratio) else math.ceil(_exact(ratio * ready))


def by_share(current: int, target: float, value: float) -> int:
    """Replicas by one number that they share, of which each should have `target`."""
    ratio = value / (target * current)
    return current if _near(ratio) else math.ceil(_exact(value / target))


def decide(
    policy: Policy, current: int, readings: Sequence[Reading], memory: Memory, now: float
) -> tuple[Decision, Memory]:
    """Say how many replicas there should be.

    Args:
        policy: bounds and behaviour.
        current: replicas that there should be so far.
        readings: of every metric of the policy.
        memory: what the last call gave, with the changes since.
        now: a moment of the clock that `memory` has, s.

    Returns:
        The decision, and what the next call has to know.
    """
    least, most = policy.spec.min_replicas, policy.spec.max_replicas
    if not least <= current <= most:
        bound = min(max(current, least), most)
        return Decision(bound, f"{current} is outside of {least} to {most}"), memory
    if not memory.proposals:  # what was before is not known: as if it had been asked for
        memory = replace(memory, proposals=((now, current),))
    asked, reason = _largest(current, readings)
    wanted, why = _stabilised(policy, current, asked, memory, now)
    limited, how = _limited(policy, current, wanted, memory, now)
    told = "; ".join(text for text in (reason, why, how) if text)
    return Decision(limited, told), _recent(replace(memory, proposals=(*memory.proposals, (now, asked))), policy, now)


def _largest(current: int, readings: Sequence[Reading]) -> tuple[int, str]:
    """The largest number counts; one metric that cannot be read is enough to keep all replicas."""
    known = [reading for reading in readings if reading.replicas is not None]
    unknown = [reading.name for reading in readings if reading.replicas is None]
    lost = f"no value of {', '.join(unknown)}"
    if not known:
        return current, lost
    first = max(known, key=lambda reading: reading.replicas or 0)
    asked = first.replicas or 0
    if unknown and asked < current:
        return current, f"{lost}, so none is taken away"
    return asked, f"{first.name} is {first.value:.4g} (target {first.target:.4g}) and asks for {asked}"


def _stabilised(policy: Policy, current: int, asked: int, memory: Memory, now: float) -> tuple[int, str]:
    """Scaling in, the largest of the last proposals counts; scaling out, the smallest."""
    up, down = policy.spec.behavior.scale_up, policy.spec.behavior.scale_down
    low = min([asked, *(n for moment, n in memory.proposals if moment > now - up.stabilization_window_seconds)])
    high = max([asked, *(n for moment, n in memory.proposals if moment > now - down.stabilization_window_seconds)])
    wanted = min(max(current, low), high)
    return wanted, "" if wanted == asked else f"the last proposals hold it at {wanted}"


def _limited(policy: Policy, current: int, wanted: int, memory: Memory, now: float) -> tuple[int, str]:
    least, most = policy.spec.min_replicas, policy.spec.max_replicas
    if wanted > current:
        top = max(current, _reach(policy.spec.behavior.scale_up, +1, current, memory, now))
        allowed, why = (most, "at most") if most <= top else (top, "the policies allow")
        return (wanted, "") if wanted <= allowed else (allowed, f"{why} {allowed}")
    if wanted < current:
        bottom = min(current, _reach(policy.spec.behavior.scale_down, -1, current, memory, now))
        allowed, why = (least, "at least") if least >= bottom else (bottom, "the policies allow")
        return (wanted, "") if wanted >= allowed else (allowed, f"{why} {allowed}")
    return current, ""


def _reach(rules: Rules, direction: int, current: int, memory: Memory, now: float) -> int:
    """How far the policies let it go now: the farthest of them, or the nearest, as `selectPolicy` says."""
    if rules.select_policy == "Disabled":
        return current
    ends = []
    for policy in rules.policies:
        at_start = current - memory._added(now - policy.period_seconds)
        if policy.type == "Pods":
            ends.append(at_start + direction * policy.value)
        elif direction > 0:
            ends.append(math.ceil(_exact(at_start * (1 + policy.value / 100))))
        else:
            ends.append(math.floor(_exact(at_start * (1 - policy.value / 100))))
    farthest = (rules.select_policy == "Max") == (direction > 0)
    return max(ends) if farthest else min(ends)


def _recent(memory: Memory, policy: Policy, now: float) -> Memory:
    """Forget what no window reaches back to."""
    behavior = policy.spec.behavior
    window = max(rules.stabilization_window_seconds for rules in (behavior.scale_up, behavior.scale_down))
    period = max(each.period_seconds for rules in (behavior.scale_up, behavior.scale_down) for each in rules.policies)
    return Memory(
        tuple(each for each in memory.proposals if each[0] > now - window) or memory.proposals[-1:],
        tuple(each for each in memory.changes if each[0] > now - period),
    )


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _near(ratio: float) -> bool:
    return abs(1 - ratio) <= TOLERANCE + 1e-9


def _exact(value: float) -> float:
    """Binary fractions are no replicas: 3.0000000000000004 is 3."""
    return round(value, 9)
