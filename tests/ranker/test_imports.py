from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipway import artifacts, config
from slipway.errors import DataError
from slipway.workloads.ranker import imports, sequences
from slipway.workloads.ranker.ingest import ingest
from tests.conftest import ROOT, until, working_in

SOURCE = '''"""import nothing"""
from __future__ import annotations
import os, sys
import numpy as np
from a.b import c, d
from . import near
from .. import far
from ..up import x
from .down import *
from . import *
import os

def f():
    import late
    try:
        from deep.er import y
    except ImportError:
        import fallback
    else:
        import otherwise
'''


def test_imports_are_read_in_order_once_each_and_relative_ones_are_resolved(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    assert imports.imported(path, "top/mid/m.py") == [
        "__future__", "os", "sys", "numpy", "a.b", "top.mid.near", "top.far", "top.up", "top.mid.down",
        "late", "deep.er", "fallback", "otherwise",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [b"def (", b"\0", b"\xff\xfe not utf-8"])
def test_a_file_that_does_not_parse_has_no_imports(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "m.py").write_bytes(text)
    assert imports.imported(tmp_path / "m.py", "m.py") == []


def test_what_mines_the_imports_ends_with_its_caller(tmp_path: Path) -> None:
    program = (
        "from slipway.workloads.ranker import imports; [print(file) for file, _ in imports.mine(['transformers'])]"
    )
    mining = subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with mining:
        assert mining.stdout is not None
        assert mining.stdout.readline(), "nothing was mined"
        assert len(working_in(tmp_path)) > 1, "it was over before it was killed"
        mining.kill()
    until(lambda: not working_in(tmp_path))


def test_the_embedded_data_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    few = {"source": "embedded", "distributions": ["rich", "aiohttp"], "min_item_events": 3}
    params = config.parse({"ingest": few})
    for name in ("one", "other"):
        with artifacts.writing(tmp_path / name) as folder:
            ingest(params, folder, {})
    assert artifacts.sha256(tmp_path / "one") == artifacts.sha256(tmp_path / "other")
    data = sequences.load(tmp_path / "one")
    assert data.meta["source"] == "embedded"
    assert "typing" in data.item_keys
    user = data.user_keys.index("rich/table.py")
    assert len(set(data.of(user).tolist())) == len(data.of(user))


def test_a_distribution_that_is_not_installed_is_named() -> None:
    with pytest.raises(DataError, match="no-such-thing is not installed"):
        list(imports.mine(["rich", "no-such-thing"]))
