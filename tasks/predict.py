"""Score a table without the service: the champion's answers to every sample of a source, in one table.

    python -m tasks.predict --source TABLE --out TABLE [--model VERSION|ALIAS|FOLDER] [--k N]

A source is read as params.yaml says (`ingest.columns` …). The ranker takes a table of events and gives user, rank, item
and score, the best next items of every user; the classifier takes a folder or archive of pictures and gives picture,
rank, class and probability; the llm takes texts and gives document, rank, token and probability. The output is Parquet
or CSV by its ending, and whole or absent. A run that ends early, however it ends, is gone on with by the same command:
what it has finished lies beside the output until then, and counts only for the same source, model and params.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from slipway import artifacts, config, locks, package, stage
from slipway.errors import DataError, ParamsError, TransientError
from slipway.evaluation import subject
from slipway.evaluation.subject import Subject
from slipway.params import IngestParams, Params
from slipway.serving import model as models
from slipway.serving import offline
from slipway.stage import Report
from slipway.workloads.base import part

ENDINGS = (".parquet", ".csv")
MOST = 100
EXAMPLES = 5

log = logging.getLogger(__name__)


def run(params: Params, report: Report) -> None:
    """Read, score what is not scored yet, join."""
    source, out, reference, k = _asked()
    scored = subject.find(params.workload, reference)
    ingest = config.check(IngestParams, params.ingest.model_dump() | {"source": source}, Path("--source"))
    given = params.model_copy(update={"workload": scored.package.workload, "ingest": ingest})
    folder = out.with_name(f".{out.name}.chunks")
    with locks.tried(f"predict-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]}", "predict") as holder:
        if holder is not None:
            raise TransientError(f"{out}: is being written by {holder}")
        _prepare(folder, _identity(given, scored, k))
        requests = part(given.workload, "offline").requests(given, scored.package.folder, folder, k)
        model = models.load(scored.package.folder, scored.name, len(os.sched_getaffinity(0)))
        report["model"], report["source"], report["out"] = scored.name, source, str(out)
        report["resumed_chunks"] = offline.done(folder)
        report["batch"] = offline.run(model, requests, folder)
        if not offline.done(folder):
            raise DataError(f"{source}: holds nothing to score")
        rows, unread = offline.write(folder, out)
        shutil.rmtree(folder)
    report["rows"], report["unread"], report["unread_examples"] = rows, len(unread), unread[:EXAMPLES]
    if unread:
        log.warning("%s: %d samples cannot be read, such as %s", source, len(unread), ", ".join(unread[:EXAMPLES]))
    print(f"written: {out}, {rows:,} rows by {scored.name}")


def _asked() -> tuple[str, Path, str, int]:
    conf = stage.conf()
    source, out, reference, k = (conf.get(key) for key in ("source", "out", "model", "k"))
    if not isinstance(source, str) or not isinstance(out, str) or not isinstance(reference or "", str):
        raise ParamsError("predict: --source and --out are needed: the table to score, and the one to write")
    if Path(out).suffix not in ENDINGS:
        raise ParamsError(f"--out: {out}: must end in {' or '.join(ENDINGS)}")
    wanted = str(10 if k is None else k)
    if not wanted.isdecimal() or not 1 <= int(wanted) <= MOST:
        raise ParamsError(f"--k: answers of each sample, 1..{MOST} (got {wanted})")
    return source, Path(out), reference or "champion", int(wanted)


def _identity(params: Params, scored: Subject, k: int) -> dict[str, Any]:
    """What has to be the same for finished chunks to count; a source behind a URL is known by its name alone."""
    path, ingest = Path(params.ingest.source), params.ingest.model_dump(mode="json")
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    seen = [(str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in files if each.is_file()]
    told = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    manifest = artifacts.sha256(scored.package.folder / package.MANIFEST)
    return {"model": manifest, "source": told, "ingest": ingest, "k": k, "chunk": offline.CHUNK}


def _prepare(folder: Path, identity: dict[str, Any]) -> None:
    """Keep the chunks of a run of the same identity; begin anew otherwise."""
    file = folder / "run.json"
    if file.exists() and artifacts.read_json(file) == identity:
        return
    shutil.rmtree(folder, ignore_errors=True)
    artifacts.write_json(file, identity)


if __name__ == "__main__":
    stage.main(
        run,
        takes={
            "source": "what to score: data of the workload's form",
            "out": "table that is written, .parquet or .csv",
            "model": "a version's number, an alias, or the folder of a package (default: champion)",
            "k": "answers of each sample (default: 10)",
        },
    )
