# SPDX-License-Identifier: Apache-2.0
"""The report pages: one file with everything inside, text never read as HTML, real pictures."""

import base64
import re
import stat
import struct
import sys
from html.parser import HTMLParser

import pytest

from tenfold.report import Card, Page, figure, heat_map, png_bytes, shares_strip

EVIL = "<script>alert(\"1\")</script> & <b>'bold'"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects tags and text; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def png():
    made, axes = figure(2, 1)
    axes.plot([0, 1], [1, 0])
    return png_bytes(made, 100)


@pytest.fixture
def full(png):
    """A page with every kind of part, each with text that looks like HTML."""
    page = Page(EVIL, EVIL)
    page.section(EVIL)
    page.section("second")
    page.heading(EVIL)
    page.text(EVIL)
    page.text(EVIL, soft=True)
    page.failure(EVIL)
    page.cards([Card(EVIL, EVIL, EVIL)])
    page.table([EVIL], [[EVIL]])
    page.image(png, EVIL, 320)
    page.preformatted(EVIL)
    page.tokens([(EVIL, 0.5), (EVIL, 0)])
    return page


def test_text_is_never_html(full):
    read = Reader(full.render())
    assert read.all("script") == []
    assert len(read.all("b")) == 1  # the card's value, not the text's
    # title, h1, subtitle, link, h2, h3, two texts, failure, three of the card, two of the table,
    # caption, pre, two tokens
    assert sum(text == EVIL for text in read.texts) == 18
    assert [img["alt"] for img in read.all("img")] == [EVIL]


def test_nothing_is_fetched(full):
    text = full.render()
    read = Reader(text)
    for tag, attrs in read.tags:
        assert tag not in ("link", "script", "iframe", "object", "embed")
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,"))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "http" not in text


def test_pictures_are_embedded_whole(full, png):
    (img,) = Reader(full.render()).all("img")
    assert base64.b64decode(img["src"].partition(",")[2], validate=True) == png
    assert img["style"] == "width:320px" and png_size(png) == (200, 100)


def test_page_is_a_whole_document(full):
    text = full.render()
    read = Reader(text)
    assert text.startswith("<!doctype html>\n<html lang=")
    assert {"charset": "utf-8"} in read.all("meta")
    assert any(m.get("name") == "viewport" for m in read.all("meta"))


def test_sections_are_linked_when_there_are_several():
    page = Page("t")
    page.section("one")
    assert Reader(page.render()).all("nav") == []
    page.section("two")
    read = Reader(page.render())
    targets = [a["href"].removeprefix("#") for a in read.all("a")]
    assert targets == [h["id"] for h in read.all("h2")] and len(set(targets)) == 2


def test_tables():
    page = Page("t")
    page.table(("name", "time", "ratio"), [["a", "1.5 ms", "–"], ["b", "2 ms", "-0.5"]], best=[1])
    read = Reader(page.render())
    assert [h.get("class") for h in read.all("th")] == [None, "num", "num"]
    assert [r.get("class") for r in read.all("tr")] == [None, None, "best"]
    assert read.texts[-9:] == ["name", "time", "ratio", "a", "1.5 ms", "–", "b", "2 ms", "-0.5"]
    assert read.all("div") == [{"class": "scroll"}]  # wide tables scroll by themselves
    with pytest.raises(ValueError, match="2 cells in a table of 3 columns"):
        page.table(("a", "b", "c"), [[1, 2]])


def test_tokens_are_shaded_by_share():
    page = Page("t")
    page.tokens([("none", 0.0), ("half", 0.5), ("all", 1.0), ("over", 3.0)])
    read = Reader(page.render())
    shades = [float(re.search(r"([\d.]+)\)", s["style"])[1]) for s in read.all("span")]
    assert read.texts[-4:] == ["none", "half", "all", "over"]
    assert len(shades) == 3 and shades[0] < shades[1] == shades[2] <= 1


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "index.html"
    assert Page("first").write(path) == path
    assert Page("second").write(str(path)) == path
    assert "second" in path.read_text() and "first" not in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path):
    class Broken:
        def __str__(self):
            raise RuntimeError("broken")

    path = Page("old").write(tmp_path / "index.html")
    page = Page("new", Broken())
    with pytest.raises(RuntimeError, match="broken"):
        page.write(path)
    assert "old" in path.read_text() and list(tmp_path.iterdir()) == [path]


def test_half_a_character_does_not_lose_the_page(tmp_path):
    """A tokenizer may cut inside a surrogate pair; UTF-8 cannot hold the half."""
    page = Page("t")
    page.tokens([("caf\udce9 ", 0.2), ("né ü 汉", 0.4)])
    text = page.write(tmp_path / "index.html").read_text(encoding="utf-8")
    assert "né ü 汉" in text and "caf? " in text


class TestPlots:
    def test_heat_map(self):
        made = heat_map([[0.0, 1.0], [float("nan"), 0.5]], ["r1", "r2"], ["c1", "c2"], "title",
                        "rows", "columns")  # fmt: skip
        (axes,) = made.axes
        cells = {t.get_position(): (t.get_text(), t.get_color()) for t in axes.texts}
        # (column, row); the NaN cell has no number; dark cells carry white text
        assert cells == {(0, 0): ("0.00", "white"), (1, 0): ("1.00", "black"),
                         (1, 1): ("0.50", "black")}  # fmt: skip
        assert [t.get_text() for t in axes.get_yticklabels()] == ["r1", "r2"]
        assert [t.get_text() for t in axes.get_xticklabels()] == ["c1", "c2"]
        assert (axes.get_ylabel(), axes.get_xlabel()) == ("rows", "columns")
        assert min(png_size(png_bytes(made))) > 100

    def test_shares_strip(self):
        made = shares_strip([[0.0, 0.5], [1.0, 0.2], [0, 0]], 640, "title", "share", "layer")
        axes, bar = made.axes
        assert axes.get_xlim() == (0, 640) and axes.get_ylim() == (2.5, -0.5)
        assert bar.get_ylabel() == "share" and bar.get_ylim() == (0, 1)

    def test_no_global_state(self):
        """Plots work without a display and leave pyplot alone."""
        before = "matplotlib.pyplot" in sys.modules
        png_bytes(figure()[0])
        assert ("matplotlib.pyplot" in sys.modules) == before

    def test_missing_matplotlib_is_a_sentence(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'tenfold\[report\]'"):
            figure()
