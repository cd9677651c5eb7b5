from __future__ import annotations

import re
import subprocess

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
SOURCES = (".py", ".lua", ".j2", ".sh", ".yaml", ".toml")


def tree() -> set[str]:
    """The paths of the README's tree: a folder stands above its files, several of a kind in one line."""
    folder, paths = "", set()
    for line in README.split("## The tree")[1].splitlines():
        if named := re.match(r"    (\S+/)( |$)", line):
            folder = named[1].removeprefix("./")
        elif named := re.match(r"        (\S+(?:, \S+)*)  ", line):
            paths |= {folder + name for name in named[1].split(", ")}
    return paths


def test_the_tree_names_every_source_file_and_no_other() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = tree()
    folders = tuple(path for path in named if path.endswith("/"))
    missing = [
        path
        for path in tracked
        if path.endswith(SOURCES)
        and not path.startswith(("tests/", *folders))
        and not path.endswith("__init__.py")
        and path not in named
    ]
    assert missing == [], "add a line for each to the README's tree"
    assert [path for path in named if not (ROOT / path).exists()] == [], "these are gone, or elsewhere"


def test_every_command_of_make_that_the_readme_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", README))
    assert {"demo", "test", "down"} <= named <= targets


def test_every_path_that_the_readme_links_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_stage_stands_in_the_table() -> None:
    stages = {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__"}
    section = README.split("## The stages")[1].split("## ")[0]
    assert stages == set(re.findall(r"^\| `([a-z]+)` \|", section, flags=re.MULTILINE))
