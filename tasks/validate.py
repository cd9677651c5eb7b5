"""Hold the data against the workload's expectations.

A hard expectation that is broken stops the pipeline; a soft one is a warning on the run.

Reads   data/ingest, the workload's suite, the last accepted version of the same source
Writes  data/accepted.json (only if the data are accepted), reports/validate.json, reports/validate.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slipway import artifacts, reporting, validation
from slipway.errors import DataError
from slipway.params import Params
from slipway.reporting import Chapter, Note, Table, Tile
from slipway.stage import Report, main
from slipway.validation import Finding, Subject
from slipway.workloads import base

DATA, ACCEPTED, PAGE = Path("data/ingest"), Path("data/accepted.json"), Path("reports/validate.html")


def run(params: Params, report: Report) -> None:
    """Check the data, show what was found, and accept them, or raise DataError."""
    ACCEPTED.unlink(missing_ok=True)  # what was accepted before says nothing of these data
    expectations, source = base.part(params.workload, "expectations"), params.ingest.source
    before = validation.accepted(params.workload, source)
    subject = expectations.examine(DATA, before)
    findings = validation.check(subject, params.validate_.model_dump())
    hard = [finding for finding in findings if finding.verdict == "failed"]
    soft = [finding for finding in findings if finding.verdict == "warning"]
    verdict = "failed" if hard else "warning" if soft else "passed"
    report["verdict"], report["compared"] = verdict, before is not None
    report["figures"] = dict(subject.figures)
    report["warnings"] = [_sentence(finding) for finding in soft]
    report["findings"] = [finding.json() for finding in findings]
    _show(source, subject, findings, expectations.chapters(DATA, before), verdict)
    if hard:
        raise DataError("\n".join([*map(_sentence, hard), f"see {PAGE}"]))
    artifacts.write_json(ACCEPTED, {"source": source, "data_sha256": artifacts.sha256(DATA)})
    validation.accept(params.workload, source, subject.profile)


def _sentence(finding: Finding) -> str:
    """Say in one line what was expected, what is, and where."""
    limits = ", ".join(f"{name} {value}" for name, value in finding.limits.items() if name != "column")
    column = f" of {finding.limits['column']}" if "column" in finding.limits else ""
    if finding.frame == "figures":
        found = f"is {finding.observed:.6g}"
    else:
        found = f"{finding.unexpected:,} rows break it" if finding.unexpected else f"found {finding.observed}"
    named = [
        " ".join(f"{name}={value}" for name, value in row.items() if value is not None) for row in finding.rows[:3]
    ]
    rows = f"; first: {'; '.join(named)}" if named else ""
    return f"{finding.severity}: {finding.about}: {finding.expectation}{column} ({limits}): {found}{rows}"


def _show(source: str, subject: Subject, findings: Sequence[Finding], more: Sequence[Chapter], verdict: str) -> None:
    figures = subject.figures
    tiles = [
        Tile("verdict", verdict, verdict),  # type: ignore[arg-type]  # one of the verdicts
        *(Tile(name, f"{figures[name]:,}") for name in subject.headline),
    ]
    rows = [
        (f.about, f.severity, f.observed if f.frame == "figures" else f.unexpected, _limit(f), f.verdict)
        for f in findings
    ]
    header = ("expectation", "severity", "observed", "allowed", "verdict")
    asked = Chapter("Expectations", [*_notes(findings), Table("What was asked of the data", header, rows)])
    offenders = [Table(f.about, list(f.rows[0]), [list(row.values()) for row in f.rows]) for f in findings if f.rows]
    left_out = [
        Table(f"Rows of the source left out: {reason}", list(rows[0]), [list(row.values()) for row in rows])
        for reason, rows in subject.rejects.items()
    ]
    chapters = [asked, Chapter("Offending rows", offenders)] if offenders else [asked]
    chapters += [Chapter("Rows that were left out", left_out)] if left_out else []
    reporting.write_html(PAGE, "Validation of the data", f"source: {source}", tiles, [*chapters, *more])


def _limit(finding: Finding) -> str:
    low, high = finding.limits.get("min_value"), finding.limits.get("max_value")
    if low is None and high is None:
        return ""
    return f"{low:,} or more" if high is None else f"{low or 0:,} to {high:,}"


def _notes(findings: Sequence[Finding]) -> list[Note]:
    broken = [finding for finding in findings if not finding.passed]
    return [Note(_sentence(f), f.verdict) for f in broken] or [Note("Every expectation is met.", "passed")]  # type: ignore[arg-type]  # one of the verdicts


if __name__ == "__main__":
    main(run)
