"""An environment that holds what `slipway[serving]` installs and nothing else, made of links into this one."""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

ALONE = ("-S", "-s")
"""Options of an interpreter that sees no packages but those on PYTHONPATH."""


def distributions(extra: str) -> set[str]:
    """Names of all that an extra of slipway installs, with what that needs in its turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"][extra]]]
    found: dict[str, set[str]] = {}
    while wanted:
        requirement = wanted.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        fresh = extras - found.setdefault(name, set())
        found[name] |= fresh
        for text in (distribution(name).requires or []) if fresh else []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in fresh):
                wanted.append(needed)
    return set(found)


def make(folder: Path) -> str:
    """Link what a replica may import into `folder`; the PYTHONPATH that goes with `ALONE`."""
    folder.mkdir()
    for name in distributions("serving"):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(installed.locate_file(top)))
    return f"{folder}:{ROOT}"
