"""The embedded data: which modules the source files of installed Python packages import, in their order.

A "user" is a source file, an "item" the dotted name of a module it imports: real sequences that are there offline, and
the same wherever the same lock is installed. `from a.b import c` counts as `a.b`: with `a.b.c` half of the items are
names seen in one project alone, with `a` there is little left to recommend, and at module level the next import is
about as predictable as a purchase (a bigram model has HR@10 .35, popularity .08). Relative imports are resolved, and a
module counts once a file, because what a user already has is never recommended.
"""

from __future__ import annotations

import ast
import importlib.metadata
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath

from slipway import commands
from slipway.errors import DataError
from slipway.progress import track

PROCESSES = 2
MAX_BYTES = 48_000
"""Longer files are left out: a twelfth of the files, half of the time to parse, mostly tables and generated code."""


def write(distributions: Sequence[str], path: Path) -> None:
    """Mine the distributions and write one row an import, `user` and `item`, as Parquet.

    Raises:
        DataError: a distribution is not installed.
    """
    import pyarrow as pa
    import pyarrow.parquet

    users: list[str] = []
    items: list[str] = []
    for file, modules in mine(distributions):
        users += [file] * len(modules)
        items += modules
    schema = pa.schema({"user": pa.string(), "item": pa.string()})
    pyarrow.parquet.write_table(pa.table({"user": users, "item": items}, schema), path)


def mine(distributions: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every source file, by its path in its distribution, with the modules it imports, in a lasting order."""
    files = _files(distributions)
    context = multiprocessing.get_context("spawn")  # a fork may copy a lock that a thread holds
    with ProcessPoolExecutor(PROCESSES, context, initializer=commands.end_with_caller) as pool:
        found = pool.map(imported, files.values(), files, chunksize=64)
        yield from zip(files, track(found, "ingest: mine imports", len(files), "files"), strict=True)


def _files(distributions: Sequence[str]) -> dict[str, Path]:
    """Source files by path in the distribution; sorted, and a file that two distributions own counts once."""
    files = {}
    for name in distributions:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise DataError(
                f"ingest.distributions: {name} is not installed; run `make setup` or leave it out"
            ) from error
        for file in sorted(distribution.files or [], key=str):
            if file.suffix == ".py" and ".." not in file.parts:
                files[file.as_posix()] = Path(str(distribution.locate_file(file)))
    return {file: path for file, path in files.items() if path.is_file() and path.stat().st_size <= MAX_BYTES}


def imported(path: Path, file: str) -> list[str]:
    """Modules that a source file imports, in the order of their first import; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold invalid escapes, which are no concern here
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            return []
    package = PurePosixPath(file).parts[:-1]
    return list(dict.fromkeys(name for node in _statements(tree.body) for name in _names(node, package)))


def _statements(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Statements in the order of the file, those inside of others too; expressions are passed over."""
    for node in body:
        yield node
        for inner in ("body", "handlers", "orelse", "finalbody", "cases"):
            blocks = getattr(node, inner, None)
            if isinstance(blocks, list):
                yield from _statements(blocks)


def _names(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Absolute dotted names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        return [node.module or ""]
    base = list(package[: len(package) - node.level + 1])
    if node.module:
        return [".".join([*base, node.module])]
    return [".".join([*base, alias.name]) for alias in node.names if alias.name != "*"]
