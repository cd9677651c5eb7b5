"""Hold data against Great Expectations suites that are kept as data, and remember what was accepted.

A suite is a JSON file of Great Expectations' own form. The `meta` of an expectation says which frame it is asked of,
what it is about, and whether it is hard (the pipeline stops) or soft (a warning); `rejects` names the rows that stand
for a figure. A limit is written `{"$PARAMETER": "max_psi"}` and comes from `params.yaml`. A frame comes in chunks, so
that every row is seen in bounded memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway import artifacts, config

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 20
"""Offending rows that are named for one expectation."""


@dataclass(frozen=True)
class Frame:
    """Rows of one kind."""

    chunks: Callable[[], Iterable[pd.DataFrame]]
    """Gives the rows from the start, some at a time."""
    names: Sequence[str] = ()
    """Columns that tell which row it is."""


@dataclass(frozen=True)
class Subject:
    """What a workload shows of its data."""

    suite: Path
    frames: Mapping[str, Frame]
    figures: Mapping[str, Any]
    """Figures of the whole, also the one row of the frame `figures`; None where there is nothing to compare with."""
    rejects: Mapping[str, Sequence[Mapping[str, Any]]]
    """Rows of the source that were left out, by reason."""
    profile: Mapping[str, Any]
    """What the next version of the same source is compared with, as JSON."""
    headline: Sequence[str]
    """Figures that stand at the top of the page."""


@dataclass
class Finding:
    """What came of one expectation."""

    about: str
    severity: str
    frame: str
    expectation: str
    limits: dict[str, Any]
    observed: Any = None
    passed: bool = True
    unexpected: int = 0
    """Rows that broke it."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The first of them."""

    @property
    def verdict(self) -> str:
        """Say passed, warning or failed."""
        return "passed" if self.passed else ("failed" if self.severity == "hard" else "warning")

    def json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "verdict": self.verdict}


def check(subject: Subject, limits: Mapping[str, Any]) -> list[Finding]:
    """Ask every expectation of the subject's suite; `limits` are the section `validate` of `params.yaml`."""
    suite = artifacts.read_json(subject.suite)
    frames = {"figures": Frame(lambda: [_one_row(subject.figures)]), **subject.frames}
    parameters = {**limits, **{name: value for name, value in subject.figures.items() if value is not None}}
    names = list(dict.fromkeys(one["meta"]["frame"] for one in suite["expectations"]))
    asked = sorted(suite["expectations"], key=lambda one: names.index(one["meta"]["frame"]))
    context, findings = _context(), []
    for name, group in groupby(asked, key=lambda one: str(one["meta"]["frame"])):
        findings += _ask(context, name, frames[name], list(group), parameters)
    for finding, expectation in zip(findings, asked, strict=True):
        if finding.frame == "figures":
            finding.observed = subject.figures[expectation["kwargs"]["column"]]
            rejects = subject.rejects.get(expectation["meta"].get("rejects"), [])
            finding.rows = [] if finding.passed else [dict(row) for row in rejects[:MAX_ROWS]]
    return findings


def _one_row(figures: Mapping[str, Any]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({name: pd.Series([value], dtype="float64") for name, value in figures.items()})


def _context() -> Any:
    """Start Great Expectations, silent, with nothing kept and nothing sent."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.data_context.types import base

    base.logger.setLevel(logging.WARNING)  # it asks for INFO itself, and tells of a folder that is never made
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = base.ProgressBarsConfig(globally=False)
    return context


def _ask(context: Any, name: str, frame: Frame, asked: Sequence[Any], parameters: Mapping[str, Any]) -> list[Finding]:
    """Ask the expectations of one frame of all its chunks, and add up the answers."""
    import great_expectations as gx

    batches = context.data_sources.add_pandas(name).add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
    suite = gx.ExpectationSuite(name=name, expectations=list(asked))
    findings = {one["meta"]["about"]: _finding(one, parameters) for one in asked}
    form = {
        "result_format": "SUMMARY",
        "partial_unexpected_count": MAX_ROWS,
        "unexpected_index_column_names": list(frame.names),
    }
    for chunk in frame.chunks():
        batch = batches.get_batch({"dataframe": chunk})
        for result in batch.validate(suite, expectation_parameters=dict(parameters), result_format=form).results:
            _add(findings[result.expectation_config.meta["about"]], result)
    return list(findings.values())


def _finding(expectation: Mapping[str, Any], parameters: Mapping[str, Any]) -> Finding:
    meta, kwargs = expectation["meta"], expectation["kwargs"]
    limits = {
        name: parameters[value["$PARAMETER"]] if isinstance(value, dict) else value for name, value in kwargs.items()
    }
    return Finding(meta["about"], meta["severity"], meta["frame"], expectation["type"], limits)


def _add(finding: Finding, result: Any) -> None:
    finding.passed = finding.passed and bool(result.success)
    finding.unexpected += int(result.result.get("unexpected_count", 0))
    if "observed_value" in result.result:
        finding.observed = result.result["observed_value"]
    for row in result.result.get("partial_unexpected_index_list") or []:
        if isinstance(row, dict) and len(finding.rows) < MAX_ROWS:  # a frame without names gives bare positions
            finding.rows.append({name: getattr(value, "item", lambda v=value: v)() for name, value in row.items()})


# What the next version of a source is compared with lies in the state folder, not in a DVC output: it is shared by all
# runs, and an output would tie a version to the one before it for ever. The price: `validate` depends on something that
# DVC does not see, so a result restored from its cache tells what was true when the stage ran. The data are what they
# were then, and accepted.json holds nothing of the comparison, so nothing further down can differ.


def accepted(workload: str, source: str) -> dict[str, Any] | None:
    """Profile of the last accepted version of a source; None before the first."""
    path = _accepted_path(workload, source)
    return artifacts.read_json(path) if path.exists() else None


def accept(workload: str, source: str, profile: Mapping[str, Any]) -> None:
    """Make this version the one that the next is compared with."""
    artifacts.write_json(_accepted_path(workload, source), {"workload": workload, "source": source, **profile})


def _accepted_path(workload: str, source: str) -> Path:
    name = hashlib.sha256(json.dumps([workload, source]).encode()).hexdigest()[:32]
    return config.home() / "accepted" / f"{name}.json"
