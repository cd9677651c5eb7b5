"""What all processes of a run must have in common, compared before the first of them trains.

Processes with other data, parameters or code would wait for one another for ever, or, worse, train a model that
nobody asked for. On several machines nothing else keeps them equal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from slipway.errors import SlipwayError

ENDS = 1 << 20  # bytes of a data file that are read at either end: a terabyte is not hashed by every process
LIBRARIES = ("torch", "deepspeed", "numpy")

Facts = dict[str, dict[str, str]]
"""By kind (data, parameters, code, run), then by name: a file's digest, a parameter's value, a library's version."""

_REMEDY = {
    "data": "copy the same ingested data to every machine",
    "parameters": "start every process with the same params.yaml",
    "code": "check out the same commit and install the same requirements.lock on every machine",
    "run": "make data, params.yaml and code the same, to the last byte, on every machine",
}


def facts(workload: str, data: Path, run: str, **sections: BaseModel) -> Facts:
    """What this process is about to train with.

    Args:
        workload: its name.
        data: folder of the ingested data; of each file its name, its size and its ends count.
        run: name of the run, which depends on every byte of its data, too (`loop.key`).
        sections: the sections of params.yaml that decide the training, by their names.
    """
    files = sorted(path for path in data.rglob("*") if path.is_file())
    parameters = {"workload": workload}
    for name, section in sections.items():
        parameters |= _leaves(section.model_dump(), name)
    package = Path(__file__).parents[1]
    return {
        "data": {str(path.relative_to(data)): _ends(path) for path in files},
        "parameters": parameters,
        "code": {name: metadata.version(name) for name in LIBRARIES}
        | {str(path.relative_to(package.parent)): _ends(path) for path in sorted(package.rglob("*.py"))},
        "run": {"its name": run},
    }


def check(mine: Facts, world_size: int) -> None:
    """Compare the facts of all processes; each of them calls this, once the process group stands.

    Raises:
        SlipwayError: names the rank, what differs from rank 0, and what to do.
    """
    import torch

    gathered: list[Facts] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, mine)
    found = disagreement(gathered)
    if found:
        raise SlipwayError(f"training: {found}")


def disagreement(facts_of_ranks: Sequence[Facts]) -> str | None:
    """Say which ranks differ from rank 0, in what, and what to do; None where all agree."""
    first, told, kinds = facts_of_ranks[0], list[str](), list[str]()
    for rank, theirs in enumerate(facts_of_ranks):
        for kind in _REMEDY:
            differing = _differing(theirs.get(kind, {}), first.get(kind, {}))
            if differing and (kind != "run" or not told):  # the others say more
                told.append(f"rank {rank} disagrees with rank 0 on {kind}: {differing}")
                kinds.append(kind)
    return f"{'; '.join(told)}; {' and '.join(_REMEDY[kind] for kind in dict.fromkeys(kinds))}" if told else None


def _differing(theirs: Mapping[str, str], first: Mapping[str, str]) -> str:
    names = [name for name in sorted({*theirs, *first}) if theirs.get(name) != first.get(name)]
    shown = [f"{name} is {theirs.get(name, 'missing')}, not {first.get(name, 'missing')}" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _leaves(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {key: leaf for part, below in value.items() for key, leaf in _leaves(below, f"{name}.{part}").items()}
    return {name: str(value)}


def _ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(ENDS))
        stream.seek(max(0, size - ENDS), os.SEEK_SET)
        digest.update(stream.read(ENDS))
    return f"{digest.hexdigest()[:8]} ({size:,} bytes)"
