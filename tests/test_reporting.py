from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slipway.reporting import Chapter, Gallery, Note, Plot, Table, Thumbnail, Tile, canvas, write_html

EVIL = "<script>alert('x')</script>&\""


@pytest.fixture
def page(tmp_path: Path) -> str:
    return written(tmp_path / "page.html")


def written(path: Path) -> str:
    figure, axes = canvas(f"x {EVIL}", "y")
    axes.plot([1, 2, 3], [1, 4, 9], label=EVIL)
    axes.legend()
    blocks: list[Table | Plot | Note | Gallery] = [
        Note(EVIL, "failed"),
        Table(EVIL, ("name", "count"), [(EVIL, 1234567), (None, None)]),
        Plot(EVIL, figure),
        Gallery(EVIL, [Thumbnail([b"\x89PNG...", b"\xff\xd8..."], EVIL, "warning")]),
        Gallery("nothing", []),
    ]
    write_html(path, EVIL, EVIL, [Tile(EVIL, EVIL, "warning")], [Chapter(EVIL, blocks)])
    return path.read_text()


class Elements(HTMLParser):
    """Collects the names of elements and checks that each that opens is closed."""

    void = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_text_is_escaped_and_every_element_closed(page: str) -> None:
    elements = Elements(page)
    assert "script" not in elements.seen
    assert page.count("&lt;script&gt;") >= 11
    assert elements.open == []
    assert page.count('src="data:image/png;base64,') == page.count('src="data:image/jpeg;base64,') == 1


def test_the_page_loads_nothing(page: str) -> None:
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)|<link|<img(?! src=.data:)", page)


def test_a_plot_is_drawn_inline_in_the_colours_of_the_page(page: str) -> None:
    assert Elements(page).seen.count("svg") == 1
    assert "currentColor" in page
    assert "#000000" not in page


def test_numbers_are_parted_and_nothing_is_a_dash(page: str) -> None:
    assert '<td class="number">1,234,567</td>' in page
    assert '<td class="number">–</td>' in page  # noqa: RUF001  # the dash itself


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path / "one.html") == written(tmp_path / "other.html")
