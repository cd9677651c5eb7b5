"""Claims as a benchmark tells them: what was published, what the baseline does here, what slipway does, and whether.

A benchmark measures baseline and ours in one run, makes a `Claim` of each pair, and ends with `tell`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Claim:
    """One row of a benchmark's table; figures are texts with their units."""

    claim: str
    published: str
    """What is to be reached, with where it comes from if that is not the published account."""
    baseline: str
    """The peer or the absence of the technique, measured here."""
    ours: str
    ratio: float
    """Ours against the baseline, so that more is better; not a number where one of them has no figure."""
    reached: bool


def tell(
    title: str, command: str, claims: Sequence[Claim], file: Path | None, beside: Mapping[str, Any] | None = None
) -> None:
    """Print the claims as a table, with the command that made it, and write them as JSON if `file` is given.

    What a plot was drawn from goes into the file `beside` them.
    """
    table = Table("claim", "published", "baseline here", "ours here", "ratio", "reached", title=title, caption=command)
    for row in claims:
        ratio, reached = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}", "yes" if row.reached else "no"
        table.add_row(row.claim, row.published, row.baseline, row.ours, ratio, reached)
    Console(width=150).print(table)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) | ({"ratio": None} if math.isnan(row.ratio) else {}) for row in claims]
        text = json.dumps({"command": command, "claims": rows, **(beside or {})}, indent=2)
        file.write_text(text + "\n")
