"""A replica loads data and never code: nothing that it imports of slipway unpickles, evaluates or executes."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import grimp
import numpy as np
import pytest

from slipway import artifacts, config
from slipway import package as packages
from tests.conftest import ROOT
from tests.serving.conftest import Start
from tests.serving.test_lifecycle import copied

CODE_LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}


def reached() -> list[str]:
    """Modules of slipway that a replica may import, those that it imports late among them."""
    graph = grimp.build_graph("slipway", exclude_type_checking_imports=True)
    seen: set[str] = set()
    roots = ["slipway.serving.__main__", *(f"slipway.workloads.{name}.schema" for name in config.workload_names())]
    while roots:
        module = roots.pop()
        if module not in seen:
            seen.add(module)
            roots += graph.find_modules_directly_imported_by(module)
    return sorted(seen)


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import {name}" for name in names if name.split(".")[0] in CODE_LOADERS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            refuses = any(ast.unparse(keyword) == "allow_pickle=False" for keyword in node.keywords)
            if called in {"eval", "exec", "compile"} or (called == "np.load" and not refuses):
                found.append(ast.unparse(node))
    return found


def test_nothing_that_a_replica_imports_loads_code_from_a_file() -> None:
    modules = reached()
    assert {"slipway.serving.engines", "slipway.package", "slipway.tracking"} <= set(modules)
    guilty: dict[str, list[str]] = {}
    for module in modules:
        place = ROOT / module.replace(".", "/")
        tree = ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text())
        body = ast.Module([node for node in tree.body if ast.unparse(node).split(":")[0] != "if TYPE_CHECKING"], [])
        if found := offences(body):
            guilty[module] = found
    # The one engine whose model is code: torch alone, and only where serve.engine asks for it (engines.of).
    assert guilty.keys() == {"slipway.serving.inductor"}
    assert set(guilty["slipway.serving.inductor"]) == {"import torch", "import torch._C._aoti"}


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        import os

        return os.mkdir, (str(self._mark), 0o700)


@pytest.mark.parametrize("form", ["array", "file"])
def test_a_package_that_holds_a_pickle_is_refused_and_nothing_of_it_runs(
    start: Start, package: Path, tmp_path: Path, form: str
) -> None:
    folder, mark = copied(package, tmp_path), tmp_path / "it ran"
    golden = folder / packages.GOLDEN
    if form == "array":
        np.savez(golden, **{"input.history": np.array([Bomb(mark)], dtype=object)})  # type: ignore[arg-type]
    else:
        golden.write_bytes(pickle.dumps(Bomb(mark)))
    manifest = artifacts.read_json(folder / packages.MANIFEST)
    manifest["files"][packages.GOLDEN] = artifacts.sha256(golden)  # whole and sealed: only its content is foul
    artifacts.write_json(folder / packages.MANIFEST, manifest)
    replica = start(folder)
    assert replica.process.wait(60) == 2, replica.log
    assert not mark.exists()
    assert "Traceback" not in replica.log
