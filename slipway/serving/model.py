"""The one model that a replica serves: a verified package, its engine, and its workload's endpoint."""

# B batch
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slipway import package as packages
from slipway.errors import ModelError, ParamsError
from slipway.package import Package
from slipway.serving import engines
from slipway.workloads.base import Endpoint, Query, Tensors, part


class Sample(msgspec.Struct, frozen=True):
    """One sample in a batch."""

    query: Query
    outputs: Sequence[str]
    """Names of the outputs that are wanted of it."""


@dataclass(frozen=True)
class Model:
    """A model that reproduced its golden outputs on this machine."""

    version: str
    package: Package
    endpoint: Endpoint
    engine: engines.Engine

    @property
    def name(self) -> str:
        """The workload, which is the model's name in the registry."""
        return self.package.workload

    def predict(self, samples: Sequence[Sample]) -> list[Tensors]:
        """Run one batch: for each sample the outputs that any sample wants, without a batch dimension."""
        names = list(dict.fromkeys(name for outputs in {s.outputs for s in samples} for name in outputs))
        feed = self.endpoint.collate([sample.query for sample in samples])
        arrays = self.engine.run(feed, names)
        return [dict(zip(names, row, strict=True)) for row in zip(*arrays, strict=True)]


def load(folder: Path, version: str, threads: int, engine: str = "auto") -> Model:
    """Verify a package's files, build its engine, and hold it against the golden outputs.

    Raises:
        ModelError: the package is missing or corrupt, or its engine answers wrongly here.
    """
    package = packages.load(folder)
    try:
        endpoint: Endpoint = part(package.workload, "schema").ENDPOINT(folder)
    except ParamsError as error:
        raise ModelError(f"{folder}: workload {package.workload!r} is not one that this slipway serves") from error
    made = engines.of(package, threads, engine)
    engines.verify(made, package)
    return Model(version, package, endpoint, made)
