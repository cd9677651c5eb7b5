"""The verdict on a canary: advance, hold or roll back, from what both tracks did in the same window.

Pure functions over counts. All four limits (requests that failed, attempts that failed, slow answers, hits of the
online metric) are questions of one kind, "is this share larger than it may be, beyond chance?", and one number answers
them, an e-value: how many times likelier the counts are if the share is too large than if it is at its limit. It is
looked at every second, and that costs nothing: a canary at its limits ever reaches 1/a with probability a at most
(Ville's inequality), however often one looks.

Source: Robbins 1970, Statistical methods related to the law of the iterated logarithm (mixtures of likelihood ratios);
        Howard et al. 2021, Time-uniform confidence sequences, arXiv:1810.08240; Wald 1945 (the ratio for a proportion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from slipway.params import CanaryParams, SloParams

FALSE_ROLLBACK = 0.05
"""Probability at most that a canary which is exactly at all its limits is rolled back, over the whole canary."""
TESTS = 4
"""Limits that share it: failed requests, failed attempts, slow answers, the online metric."""
WORSE = 1 / FALSE_ROLLBACK
"""Evidence that a canary over a limit is worse than the champion too."""
ODDS = [2.0 ** (k / 2) for k in range(1, 17)]
"""How much larger than allowed the odds may be: 1.4 to 256 times, weighted by their inverse square roots.

So small excesses, which take longest to see, cost little; and one event alone, worth 19, is never proof.
"""


class Verdict(StrEnum):
    """What to do with the canary."""

    ADVANCE = "advance"
    HOLD = "hold"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class Histogram:
    """Latencies, counted by upper bound."""

    bounds_ms: tuple[float, ...] = ()
    """Rising upper bounds; the last is infinite."""
    counts: tuple[int, ...] = ()
    """Answers in each bucket (not cumulative), one a bound."""

    def quantile(self, share: float) -> float | None:
        """Upper bound of the bucket in which the quantile lies (ms); None without answers.

        The bound, and no point between two bounds: a histogram knows no more.
        """
        wanted, seen = share * sum(self.counts), 0
        for bound, count in zip(self.bounds_ms, self.counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return None

    def over(self, limit_ms: float) -> int:
        """Answers that surely took longer than `limit_ms`: those in buckets that begin at it or above."""
        starts = (0.0, *self.bounds_ms)
        return sum(count for start, count in zip(starts, self.counts, strict=False) if start >= limit_ms)


@dataclass(frozen=True)
class Track:
    """What one track did in a window."""

    requests: int = 0
    """Requests that the gateway answered."""
    failed: int = 0
    """Of those, the ones whose client got no answer: 5xx, or 429."""
    attempts: int = 0
    """Tries on replicas of this version, also those whose failure a retry healed."""
    errors: int = 0
    """Of those, the ones that failed or timed out."""
    latency: Histogram = Histogram()
    """Time to answer, seen at the gateway, of realtime requests."""
    feedbacks: int = 0
    """Answers of which it became known what the user took."""
    hits: int = 0
    """Of those, the ones that had shown it."""


@dataclass(frozen=True)
class Window:
    """Both tracks at the same time."""

    canary: Track
    champion: Track | None = None
    """None in a first release."""


@dataclass(frozen=True)
class Limits:
    """What a canary is held against."""

    canary: CanaryParams
    slo: SloParams

    @property
    def proof_in_step(self) -> float:
        """Evidence that a limit judged anew in each step needs."""
        return TESTS * len(self.canary.step_weights) / FALSE_ROLLBACK

    @property
    def proof(self) -> float:
        """Evidence that a limit judged over all steps together needs."""
        return TESTS / FALSE_ROLLBACK


@dataclass(frozen=True)
class Finding:
    """What one limit says."""

    limit: str
    told: str
    """The figures, for people."""
    bad: int
    """Requests, attempts or answers of the canary that count against it."""
    violated: bool


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it rests on."""

    verdict: Verdict
    findings: tuple[Finding, ...]
    few: str = ""
    """Why it is too early to say, if it is."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """What was decisive, for people."""
        violated = tuple(f"{f.limit}: {f.told}" for f in self.findings if f.violated)
        return violated or ((self.few,) if self.few else tuple(f"{f.limit}: {f.told}" for f in self.findings))


@dataclass(frozen=True)
class Share:
    """`part` of `whole`, where at most the share `limit` (0..1) would be fine."""

    part: int
    whole: int
    limit: float

    @property
    def ratio(self) -> float:
        """0 without events."""
        return self.part / self.whole if self.whole else 0.0


def evidence(*shares: Share) -> float:
    """Tell how many times likelier the counts are if the odds are above their limits than if they are at them.

    The shares are strata with limits of their own, such as the steps of a canary, and exceed them by one factor.
    The likelihood ratio of odds `o` times those of a limit q, for x of n, is o^x / (1 + q (o - 1))^n; this is its
    weighted mean over `ODDS`. It never falls when a `part` grows.
    """
    parts = sum(share.part for share in shares) - 0.5  # the half is the weight
    logs = [parts * math.log(o) - sum(s.whole * math.log1p(s.limit * (o - 1)) for s in shares) for o in ODDS]
    return math.fsum(math.exp(min(log, 700.0)) for log in logs) / math.fsum(1 / math.sqrt(o) for o in ODDS)


def judge(now: Window, limits: Limits, earlier: Sequence[Window] = ()) -> Judgement:
    """Judge a canary: its latency by the present step, its errors and its online metric over the earlier steps too.

    A violated limit is a rollback at any moment of a step; too few requests are a reason to wait, never to roll back.
    """
    windows = [*earlier, now]
    findings = (_failed(windows, limits), _errors(windows, limits), _slow(now, limits), _metric(windows, limits))
    if any(finding.violated for finding in findings):
        return Judgement(Verdict.ROLLBACK, findings)
    if now.canary.requests < limits.canary.min_requests:
        few = f"{now.canary.requests} requests on the canary, {limits.canary.min_requests} are needed to judge it"
        return Judgement(Verdict.HOLD, findings, few)
    return Judgement(Verdict.ADVANCE, findings)


def _failed(windows: Sequence[Window], limits: Limits) -> Finding:
    mine = [(w.canary.failed, w.canary.requests) for w in windows]
    theirs = [(w.champion.failed, w.champion.requests) for w in windows if w.champion]
    return _exceeds("failed requests", mine, theirs, limits)


def _errors(windows: Sequence[Window], limits: Limits) -> Finding:
    mine = [(w.canary.errors, w.canary.attempts) for w in windows]
    theirs = [(w.champion.errors, w.champion.attempts) for w in windows if w.champion]
    return _exceeds("failed attempts", mine, theirs, limits)


Counts = Sequence[tuple[int, int]]  # in each window: how many failed, of how many


def _exceeds(what: str, mine: Counts, theirs: Counts, limits: Limits) -> Finding:
    limit = limits.slo.max_error_ratio
    total, champion = (Share(sum(p for p, _ in c), sum(n for _, n in c), limit) for c in (mine, theirs))
    told = f"{total.part} of {total.whole} ({total.ratio:.2%}), allowed {limit:.2%}"
    told += f", champion {champion.part} of {champion.whole}" if theirs else ""
    return Finding(what, told, total.part, evidence(total) >= limits.proof and _worse(mine, theirs))


def _slow(now: Window, limits: Limits) -> Finding:
    """P99 over a limit is more than 1 % of the answers over it, which can be counted and tested like errors."""
    limit_ms = limits.slo.p99_ms
    reference = now.champion.latency.quantile(0.99) if now.champion else None
    if reference is not None and now.champion and now.champion.requests >= limits.canary.min_requests:
        # A champion at 2 ms is no reason to refuse one at 5 ms: ratios count from a tenth of the SLO.
        limit_ms = min(limit_ms, max(limits.canary.max_p99_ratio * reference, limits.slo.p99_ms / 10))
    over, total = now.canary.latency.over(limit_ms), sum(now.canary.latency.counts)
    theirs = [(now.champion.latency.over(limit_ms), sum(now.champion.latency.counts))] if now.champion else []
    told = f"{_ms(now.canary.latency.quantile(0.99))}, allowed {limit_ms:.3g} ms"
    told += f", champion {_ms(reference)}" if now.champion else ""
    violated = evidence(Share(over, total, 0.01)) >= limits.proof_in_step and _worse([(over, total)], theirs)
    return Finding("P99", told, over, violated)


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g} ms"


def _worse(mine: Counts, theirs: Counts) -> bool:
    """Is the canary, over its limit, also worse than the champion in the same windows?

    Both may suffer, from the machine for instance: then an event falls on the canary as often as a request does.
    """
    pairs = [(m, t) for m, t in zip(mine, theirs, strict=False) if t[1]]
    shares = [Share(m[0], m[0] + t[0], m[1] / (m[1] + t[1])) for m, t in pairs]
    return not shares or evidence(*shares) >= WORSE


def _metric(windows: Sequence[Window], limits: Limits) -> Finding:
    """Is the canary's hit ratio more than `max_metric_drop` below the champion's?

    If it is exactly so far below, a hit falls on the champion with the odds of its feedbacks to that share of the
    canary's (exact for rare hits, on the safe side for frequent ones). Step by step, because the odds go with weight.
    """
    pairs = [(w.champion, w.canary) for w in windows if w.champion is not None]
    kept = 1 - limits.canary.max_metric_drop
    shares = [
        Share(b.hits, b.hits + c.hits, b.feedbacks / (b.feedbacks + kept * c.feedbacks))
        for b, c in pairs
        if b.feedbacks and c.feedbacks
    ]
    mine = Share(sum(w.canary.hits for w in windows), sum(w.canary.feedbacks for w in windows), 1.0)
    theirs = Share(sum(b.hits for b, _ in pairs), sum(b.feedbacks for b, _ in pairs), 1.0)
    told = f"{mine.ratio:.3f} of {mine.whole} feedbacks"
    told += f", champion {theirs.ratio:.3f} of {theirs.whole}, drop allowed {1 - kept:.0%}" if pairs else ""
    violated = bool(shares) and evidence(*shares) >= limits.proof
    return Finding("online metric", told, mine.whole - mine.part, violated)
