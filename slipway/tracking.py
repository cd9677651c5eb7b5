"""The registry of models, over MLflow: versions with their lineage, aliases, and a verified local copy of each.

    home()/models/WORKLOAD/VERSION/
        package/        the sealed model package
        replay.jsonl    held-out samples, replayed as live traffic while the version is a canary
        fp32.onnx       the full model, where a compressed one is served: what it is measured against
        version.json    what the copy must be: SHA-256 of each; written last

Aliases: `candidate` passed every gate, `champion` serves everybody, `previous` is what a rollback goes back to. A
version's artifacts lie in the MLflow run that made it, under `model-CONTENT/`; the copy is what replicas load, so a
replica starts without MLflow.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway import artifacts, config, locks, package, store
from slipway.errors import DataError, ModelError, RegistryError, TransientError

logger = logging.getLogger(__name__)

PACKAGE, REPLAY, REFERENCE, MANIFEST = "package", "replay.jsonl", "fp32.onnx", "version.json"
CONTENT_TAG = "content"
PARTS = {CONTENT_TAG: PACKAGE, "replay": REPLAY, "fp32": REFERENCE}
"""What a version consists of, by the tag that holds its SHA-256; the last is there for compressed models alone."""


def aliases(workload: str) -> dict[str, str]:
    """All aliases of a workload and the version that bears each."""
    if not store.exists():
        return {}
    try:
        with store.translated(workload):
            found = store.reader().get_registered_model(workload).aliases
            return {name: str(version) for name, version in found.items()}
    except RegistryError:  # nothing was ever registered
        return {}


def alias(workload: str, name: str) -> str | None:
    """Give the version that bears an alias."""
    return aliases(workload).get(name)


def set_alias(workload: str, name: str, version: str | None) -> None:
    """Give an alias to a version, or to none; both may be repeated.

    Raises:
        RegistryError: there is no such version.
    """
    with store.translated(f"{workload}: alias {name}"):
        if version is not None:
            store.light().set_registered_model_alias(workload, name, version)
        elif name in aliases(workload):
            store.light().delete_registered_model_alias(workload, name)


def resolve(workload: str, reference: str) -> str:
    """Turn an alias or a version number into the version number.

    Raises:
        RegistryError: no version bears the alias or the number; says which there are.
    """
    if reference.isdigit():
        if not (_folder(workload, reference) / MANIFEST).exists():
            _version(workload, reference)
        return reference
    known = aliases(workload)
    if reference in known:
        return known[reference]
    there = ", ".join(f"{name} = {version}" for name, version in sorted(known.items())) or "none"
    raise RegistryError(
        f"{workload}: no version has the alias {reference!r} (aliases: {there}); register one with `dvc repro`"
    )


def _version(workload: str, version: str) -> Any:
    try:
        if not store.exists():
            raise RegistryError("nothing was registered yet")
        with store.translated(workload):
            return store.reader().get_model_version(workload, version)
    except RegistryError as error:
        raise RegistryError(
            f"{workload}/{version}: no such version in the registry at {store.locate().uri}; if its registration came "
            "from another checkout's cache, register it here: `dvc repro -s -f register`"
        ) from error


def fetch(workload: str, version: str) -> Path:
    """Give the folder of a version, with `package/` and `replay.jsonl`, verified; a torn copy is fetched again.

    It is held against what the registry recorded; while that does not answer, against what it recorded when the copy
    was made, so that a replica starts again without it.

    Raises:
        RegistryError: there is no such version.
        ModelError: the registry's own artifacts are corrupt, too.
    """
    place = _folder(workload, version)
    try:
        verify(place, _recorded(workload, version))
    except ModelError as error:
        logger.warning("the copy of %s/%s is fetched again: %s", workload, version, error)
        _version(workload, version)
        _download(workload, version, place)
    return place


def _recorded(workload: str, version: str) -> Mapping[str, str] | None:
    """SHA-256 of the parts of a version in the registry; None: it cannot be asked."""
    if not store.exists():
        return None
    try:
        return _parts(_version(workload, version).tags)
    except TransientError as error:
        logger.warning("%s/%s is held against the record of its copy alone: %s", workload, version, error)
        return None


def _parts(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: tags[key] for key in PARTS if key in tags}


def verify(place: Path, recorded: Mapping[str, str] | None = None) -> None:
    """Check a copy against what was registered.

    Args:
        place: the copy's folder.
        recorded: SHA-256 of each part by its tag, from the registry; None: the copy's own record is believed.

    Raises:
        ModelError: a file is missing or not what it was; names it.
    """
    try:
        expected = artifacts.read_json(place / MANIFEST)
    except DataError as error:
        raise ModelError(f"{place}: no copy of a version ({error})") from error
    if recorded is not None and expected != recorded:
        raise ModelError(f"{place / MANIFEST}: not what the registry recorded")
    package.load(place / PACKAGE)
    for key, name in PARTS.items():
        path, known = place / name, expected.get(key)
        optional = path.name == REFERENCE and known is None
        if not optional and (not path.exists() or artifacts.sha256(path) != known):
            raise ModelError(f"{path}: missing or not what was registered")


def _download(workload: str, version: str, place: Path) -> None:
    client, found = store.reader(), _version(workload, version)
    if CONTENT_TAG not in found.tags:
        raise RegistryError(f"{workload}/{version}: has no tag {CONTENT_TAG!r}, so it was not registered by slipway")
    with tempfile.TemporaryDirectory(prefix="slipway-") as scratch, store.translated(f"{workload}/{version}"):
        try:
            fetched = Path(client.download_artifacts(found.run_id, _under(found.tags[CONTENT_TAG]), scratch))
        except OSError as error:
            raise ModelError(
                f"{workload}/{version}: the registry has lost its artifacts ({error}); register the model again"
            ) from error
        expected = _parts(found.tags)
        artifacts.write_json(fetched / MANIFEST, expected)
        try:
            verify(fetched)
        except ModelError as error:
            raise ModelError(
                f"{workload}/{version}: the copy at {place} and the registry's artifacts are both corrupt ({error}); "
                "register the model again with `dvc repro -s -f register`"
            ) from error
        _keep(place, {key: fetched / PARTS[key] for key in expected}, expected)


def _under(content: str) -> str:
    """Where a version's artifacts lie in its run; one run can make several, when a stage is repeated by hand."""
    return f"model-{content[:12]}"


def _keep(place: Path, parts: Mapping[str, Path], expected: Mapping[str, Any]) -> None:
    with locks.held("models"), artifacts.writing(place) as beside:
        beside.mkdir()
        for key, path in parts.items():
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, beside / PARTS[key])
        artifacts.write_json(beside / MANIFEST, expected)


def _folder(workload: str, version: str) -> Path:
    return config.home() / "models" / workload / version


def register(
    workload: str, sealed: Path, replay: Path, run: str, lineage: Mapping[str, str], reference: Path | None = None
) -> str:
    """Give a package a version; the same package always has the same one, however often it is registered.

    Args:
        workload: name of the registered model.
        sealed: the model package.
        replay: its held-out samples, JSON lines.
        run: MLflow run that keeps the artifacts.
        lineage: tags of a new version: git commit, data, metrics.
        reference: the full model, a file named `fp32.onnx`, where the package holds a compressed one.

    Raises:
        ModelError: the package is corrupt.
    """
    loaded = package.load(sealed)
    parts = {CONTENT_TAG: sealed, "replay": replay} | ({} if reference is None else {"fp32": reference})
    expected = {key: artifacts.sha256(path) for key, path in parts.items()}
    client = store.client()
    with locks.held(f"register-{workload}"), store.translated(workload):
        known = [v for v in _versions(client, workload) if v.tags.get(CONTENT_TAG) == expected[CONTENT_TAG]]
        if known:
            version = min(known, key=lambda v: int(v.version))
            number, expected = str(version.version), _parts(version.tags)
        else:
            signature = {"inputs": [vars(s) for s in loaded.inputs], "outputs": [vars(s) for s in loaded.outputs]}
            form = {"precision": loaded.precision, "recipe": loaded.recipe, "engine": loaded.engine}
            facts = {**lineage, **expected, **form, "signature": json.dumps(signature)}
            client.log_artifacts(run, str(sealed), f"{_under(expected[CONTENT_TAG])}/{PACKAGE}")
            for path in parts.values():
                if path.is_file():
                    client.log_artifact(run, str(path), _under(expected[CONTENT_TAG]))
            number = _create(client, workload, run, facts)
    place = _folder(workload, number)
    try:
        verify(place)
        fresh = artifacts.read_json(place / MANIFEST) != expected
    except ModelError:
        fresh = True
    kept = {key: path for key, path in parts.items() if key in expected}  # as it was first registered
    if fresh and {key: artifacts.sha256(path) for key, path in kept.items()} == expected:
        _keep(place, kept, expected)
    return number


def _versions(client: Any, workload: str) -> list[Any]:
    return list(client.search_model_versions(f"name = '{workload}'", max_results=10_000))


def _create(client: Any, workload: str, run: str, facts: Mapping[str, str]) -> str:
    if not client.search_registered_models(f"name = '{workload}'"):
        client.create_registered_model(workload, description=f"Models of the workload {workload}.")
    source = f"{client.get_run(run).info.artifact_uri}/{_under(facts[CONTENT_TAG])}"
    metrics = {name.removeprefix("metric."): value for name, value in facts.items() if name.startswith("metric.")}
    lines = [f"| {name} | {value} |" for name, value in metrics.items()]
    made = client.create_model_version(
        workload,
        source=source,
        run_id=run,
        tags=dict(facts),
        description="\n".join(["| metric | value |", "|---|---|", *lines]),
    )
    return str(made.version)
