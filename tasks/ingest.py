"""Read the source into columns that are mapped into memory, not read.

Reads   ingest.source: a table of events, texts, folders of pictures, or `embedded`, as the workload understands it
Writes  data/ingest (whole or absent), reports/ingest.json
"""

from __future__ import annotations

from pathlib import Path

from slipway import artifacts
from slipway.params import Params
from slipway.stage import Report, main
from slipway.workloads import base

DATA = Path("data/ingest")


def run(params: Params, report: Report) -> None:
    """Let the workload ingest its source."""
    with artifacts.writing(DATA) as folder:
        base.part(params.workload, "ingest").ingest(params, folder, report)


if __name__ == "__main__":
    main(run)
