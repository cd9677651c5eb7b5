"""The workspace of a DAG run: a git worktree on a branch of its own, so that the user's checkout is never touched.

    home()/runs/ID          the worktree, on branch run/ID, while the run lasts; kept for inspection where it failed
    home()/runs/ID.json     what is known of it: commit, whether the checkout was dirty, when it began, how it ended

The code is the checkout's HEAD, the parameters are its params.yaml with the values of the form over it, and the DVC
cache is the checkout's own, so equal inputs reuse earlier results. At the end params.yaml and dvc.lock are committed:
`git checkout run/ID && dvc repro` says that all is up to date, and `git merge run/ID && dvc checkout` adopts the run.
"""

from __future__ import annotations

import configparser
import hashlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from slipway import artifacts, config, locks, store
from slipway.errors import DataError, SlipwayError
from slipway.params import Params

KEEP_FAILED = 3
IDENTITY = ("user.name=slipway", "user.email=slipway@localhost", "commit.gpgsign=false", "core.hooksPath=/dev/null")

Ending = Literal["open", "succeeded", "failed"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workspace:
    """One workspace, as its file tells."""

    name: str
    checkout: str
    """Root of the user's checkout."""
    commit: str
    """The checkout's HEAD when the run began."""
    dirty: bool
    """Whether the checkout had changes that are not in the run."""
    created: str
    """ISO time with offset."""
    ending: Ending = "open"
    mlflow_run: str = ""
    """The MLflow run that records it; empty where no server answered when it began."""

    @property
    def folder(self) -> Path:
        """Root of the worktree."""
        return _runs() / self.name

    @property
    def branch(self) -> str:
        """Its branch in the checkout's repository."""
        return f"run/{self.name}"


def name_of(dag: str, run: str) -> str:
    """Name the workspace of a DAG run: readable, legal as a folder and as a branch, and one name a run."""
    digest = hashlib.sha256(f"{dag}\0{run}".encode()).hexdigest()[:6]
    return f"{dag}-{re.sub(r'[^A-Za-z0-9]+', '-', run).strip('-')[:60]}-{digest}"


def _runs() -> Path:
    return config.home() / "runs"


def _card(name: str) -> Path:
    return _runs() / f"{name}.json"


def read(name: str) -> Workspace:
    """Read what is known of a workspace.

    Raises:
        DataError: there is none of this name.
    """
    return Workspace(**artifacts.read_json(_card(name)))


def write(workspace: Workspace) -> None:
    """Keep what is known of a workspace."""
    artifacts.write_json(_card(workspace.name), asdict(workspace))


def create(name: str, checkout: Path, values: Mapping[str, Any]) -> Workspace:
    """Make the workspace `name`, or give the one that is there; killed anywhere, it may be called again.

    Args:
        name: see `name_of`.
        checkout: root of the user's checkout.
        values: dotted keys of params.yaml and the values that this run has instead.

    Raises:
        ParamsError: a value is not allowed; nothing stays behind.
        DataError: the source of the data is not there.
        SlipwayError: git refuses; says what it said.
    """
    with locks.held("workspace"):
        folder = _runs() / name
        if _card(name).exists() and (folder / ".git").exists():
            known = replace(read(name), ending="open")
            write(known)
            return known
        _discard(checkout, folder)
        _add(checkout, folder, f"run/{name}")
        try:
            _share_cache(checkout, folder)
            shutil.copyfile(checkout / "params.yaml", folder / "params.yaml")
            _place_source(checkout, folder, config.override(folder / "params.yaml", values))
        except SlipwayError:
            _discard(checkout, folder)
            _git(checkout, "branch", "-D", f"run/{name}")
            raise
        made = Workspace(
            name, str(checkout), _git(checkout, "rev-parse", "HEAD"), _is_dirty(checkout), datetime.now(UTC).isoformat()
        )
        write(made)
    if made.dirty:
        log.warning("the checkout has changes that are not committed: the run has commit %s without them", made.commit)
    return made


def _add(checkout: Path, folder: Path, branch: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if _git(checkout, "branch", "--list", branch):  # an earlier try, or a run that is repeated after it was pruned
        _git(checkout, "worktree", "add", "--force", str(folder), branch)
    else:
        _git(checkout, "worktree", "add", "-b", branch, str(folder), "HEAD")


def _discard(checkout: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _git(checkout, "worktree", "prune")


def _share_cache(checkout: Path, folder: Path) -> None:
    """Point the worktree's DVC to the checkout's cache, as `dvc cache dir --local` would, without its seconds."""
    cache = checkout / ".dvc" / "cache"
    for name in ("config.local", "config"):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(checkout / ".dvc" / name)
        if parser.has_option("cache", "dir"):
            cache = checkout / ".dvc" / parser.get("cache", "dir")  # a relative one counts from .dvc
            break
    text = f"[cache]\n    dir = {cache.resolve()}\n    type = hardlink,symlink,copy\n"
    artifacts.write_text(folder / ".dvc" / "config.local", text)


def _place_source(checkout: Path, folder: Path, params: Params) -> None:
    """Let a source that lies in the checkout, but not in git, be found from the worktree: by its absolute path."""
    source = params.ingest.source
    if "://" in source or (folder / source).exists():  # a URL; absolute and there; or in git
        return
    if not (checkout / source).exists():
        raise DataError(f"params.yaml: ingest.source: {checkout / source}: no such file; give a path or URL of a table")
    config.override(folder / "params.yaml", {"ingest.source": str((checkout / source).resolve())})


def _is_dirty(checkout: Path) -> bool:
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no").splitlines()
    return any(line[3:] != "params.yaml" for line in changed)  # params.yaml is taken as it is


def close(name: str, succeeded: bool) -> Workspace:
    """Commit the run's parameters and results; prune the worktree, or keep it where the run failed."""
    with locks.held("workspace"):
        workspace = read(name)
        checkout = Path(workspace.checkout)
        if (workspace.folder / ".git").exists():
            _commit(workspace)
            if succeeded:
                _remove(workspace)
        workspace = replace(workspace, ending="succeeded" if succeeded else "failed")
        write(workspace)
        for old in _failed(checkout)[:-KEEP_FAILED]:
            _remove(old)
    return workspace


def _commit(workspace: Workspace) -> None:
    for path in ("params.yaml", "dvc.lock"):
        if (workspace.folder / path).exists():
            _git(workspace.folder, "add", "--force", path)
    if _git(workspace.folder, "status", "--porcelain", "--untracked-files=no"):
        _git(workspace.folder, "commit", "--quiet", "-m", f"run: {workspace.name}")


def _remove(workspace: Workspace) -> None:
    _discard(Path(workspace.checkout), workspace.folder)


def _failed(checkout: Path) -> list[Workspace]:
    """Workspaces that are kept because their run failed, the oldest first."""
    known = [read(path.stem) for path in _runs().glob("*.json")]
    kept = [w for w in known if w.ending == "failed" and w.folder.exists() and Path(w.checkout) == checkout]
    return sorted(kept, key=lambda w: w.created)


def _git(folder: Path, *arguments: str) -> str:
    options = [part for setting in IDENTITY for part in ("-c", setting)]
    # A caller inside of a git hook has variables that would lead git to another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(folder), *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SlipwayError(f"{folder}: git {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip("\n")


def begin_record(workspace: Workspace) -> Workspace:
    """Start the MLflow run that will record this one, so that tasks can lead to it; without a server it comes later."""
    place = store.locate()
    if workspace.mlflow_run or not place.server:
        return workspace
    tags = {"git_commit": workspace.commit, "dirty": "yes" if workspace.dirty else "no"}
    begun = replace(workspace, mlflow_run=store.start(workspace.name, tags))
    write(begun)
    return begun


def show(name: str, stage: str) -> None:
    """Put the reports of a stage under the run's record at once, while the run goes on; the record is filled later."""
    if not _card(name).exists() or not read(name).mlflow_run or not store.locate().own:
        return
    known = read(name)
    target = store.artifacts_of(known.mlflow_run) / "reports"
    for path in (known.folder / "reports").glob(f"{stage}.*"):
        artifacts.write_bytes(target / path.name, path.read_bytes())
