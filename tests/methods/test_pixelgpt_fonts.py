# SPDX-License-Identifier: Apache-2.0
"""Fonts: fallback, colours, saved processors, the command line, pictures."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import fails, succeeds
from fontTools.colorLib.builder import buildCOLR, buildCPAL
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from tenfold.pixelgpt import (
    FontFile,
    PixelProcessor,
    RendererMismatch,
    default_fonts,
    register,
    strip_picture,
    write_png,
)
from tenfold.pixelgpt.fonts import FontChain, packaged_font
from tenfold.pixelgpt.glyphs import scaled
from tenfold.pixelgpt.shaping import clusters, script_of
from tenfold.testing import processes

FONT = packaged_font()
L = 16
GRIN = "\U0001f600"


def box(left, bottom, right, top):
    pen = TTGlyphPen(None)
    pen.moveTo((left, bottom))
    for point in ((left, top), (right, top), (right, bottom)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A font of two colours for one emoji and one letter of no script, and another file of that name."""
    folder = tmp_path_factory.mktemp("fonts")
    for name, right in (("colour.ttf", 900), ("other/colour.ttf", 800)):
        (folder / name).parent.mkdir(exist_ok=True)
        made = FontBuilder(1000, isTTF=True)
        made.setupGlyphOrder([".notdef", "space", "face", "red", "blue", "own"])
        made.setupCharacterMap({0x20: "space", 0x1F600: "face", 0xE001: "own"})
        empty = TTGlyphPen(None).glyph()
        made.setupGlyf(
            {
                ".notdef": box(0, 0, 500, 700),
                "space": empty,
                "face": box(0, 0, right, 800),
                "red": box(0, 0, 450, 800),
                "blue": box(450, 0, right, 800),
                "own": box(100, 0, 500, 600),
            }
        )
        made.setupHorizontalMetrics(
            {g: (1000, {"blue": 450, "own": 100}.get(g, 0)) for g in made.font.getGlyphOrder()}
        )
        made.setupHorizontalHeader(ascent=800, descent=-200)
        made.setupNameTable({"familyName": "Colour", "styleName": "Regular"})
        made.setupOS2()
        made.setupPost()
        made.font["COLR"] = buildCOLR({"face": [("red", 0), ("blue", 1)]})
        made.font["CPAL"] = buildCPAL([[(1, 0, 0, 1), (0, 0, 1, 1)]])
        made.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def colour(folder):
    return str(folder / "colour.ttf")


class TestFonts:
    def test_default_chain_begins_with_the_packaged_font(self, folder, monkeypatch):
        shutil.copy(FONT, folder / "NotoSansThai-Regular.ttf")
        shutil.copy(FONT, folder / "NotoSansMono-Regular.ttf")
        monkeypatch.setenv("TENFOLD_FONTS", str(folder))
        names = [f.path.name for f in default_fonts()]
        assert names[0] == "DejaVuSans.ttf" and "NotoSansThai-Regular.ttf" in names
        assert "NotoSansMono-Regular.ttf" not in names and len(set(names)) == len(names)

    def test_no_font(self, tmp_path):
        (tmp_path / "text.ttf").write_text("no font at all")
        with pytest.raises(ValueError, match=r"text.ttf' is not a TrueType or OpenType"):
            PixelProcessor(tmp_path / "text.ttf")
        with pytest.raises(ValueError, match="has no face 7, only one"):
            PixelProcessor(f"{FONT}#7")
        (tmp_path / "cut.ttf").write_bytes(FONT.read_bytes()[:400])
        with pytest.raises(ValueError, match=r"cut.ttf' has no glyphs: is it damaged"):
            PixelProcessor(tmp_path / "cut.ttf")

    def test_a_font_without_outlines(self, colour, tmp_path):
        from fontTools.ttLib import TTFont

        with TTFont(colour) as font:
            for table in ("glyf", "loca", "COLR", "CPAL"):
                del font[table]
            font.save(tmp_path / "empty.ttf")
        with pytest.raises(
            ValueError, match=r"empty.ttf' has neither outlines nor bitmaps in colour"
        ):
            PixelProcessor([FONT, tmp_path / "empty.ttf"])

    def test_paint_graphs_are_not_taken_for_colours(self, colour, tmp_path):
        from fontTools.ttLib import TTFont

        with TTFont(colour) as font:
            solid = {
                "Format": 10,
                "Glyph": "red",
                "Paint": {"Format": 2, "PaletteIndex": 0, "Alpha": 1.0},
            }
            font["COLR"] = buildCOLR({"face": solid}, version=1)
            font.save(tmp_path / "paint.ttf")
        assert FontFile(colour).coloured and not FontFile(tmp_path / "paint.ttf").coloured

    def test_without_the_packages(self):
        code = (
            "import sys; sys.modules['uharfbuzz'] = None\n"
            "from tenfold.pixelgpt import PixelProcessor\n"
            "assert not {'transformers', 'freetype', 'PIL', 'matplotlib'} & set(sys.modules)\n"
            "try: PixelProcessor()\n"
            "except ImportError as e: print(e)"
        )
        done = processes.python("-c", code, loaded=("torch",))
        assert "uharfbuzz and freetype-py: pip install 'tenfold[pixel]'" in done.stdout, done.stderr

    def test_fallback_by_character(self, colour):
        processor = PixelProcessor([FONT, colour], max_patches=L)
        private = processor("\ue001").pixel_values
        assert torch.equal(
            private,
            PixelProcessor([FONT, colour], max_patches=L, on_missing="error")(
                "\ue001"
            ).pixel_values,
        )
        chain = FontChain([FontFile(FONT), FontFile(colour)], colour=True)
        assert [
            chain.choose(c) for c in ("a", "\ue001", "\ue002", "\u200d", "a\u0301", "\u00a0")
        ] == [0, 1, None, 0, 0, 0]
        assert chain.choose(GRIN) == 1 and chain.choose(GRIN + "\ufe0e") == 0
        assert FontChain(chain.fonts, colour=False).choose(GRIN) == 0

    def test_clusters_and_scripts(self):
        flags = "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7"
        family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
        assert clusters(flags) == [(0, 2), (2, 4)] and clusters(family) == [(0, 5)]
        assert clusters("e\u0301a\U0001f44d\U0001f3fdb") == [(0, 2), (2, 3), (3, 5), (5, 6)]
        assert clusters("") == [] and clusters("\u0301") == [(0, 1)]
        assert [script_of(c) for c in "a\u0416\u4e2d1"] == ["Latn", "Cyrl", "Hani", "Zyyy"]

    def test_colours(self, colour):
        def drawn(**settings):
            return PixelProcessor([FONT, colour], max_patches=L, **settings)(
                f"a {GRIN} b"
            ).pixel_values[0]

        rgb, gray, two = drawn(), drawn(mode="gray"), drawn(mode="binary")
        seen = {tuple(c) for c in rgb.flatten(1).T.tolist()}
        assert (255, 0, 0) in seen and (0, 0, 255) in seen
        assert rgb.shape[0] == 3 and gray.shape[0] == 1 and set(two.unique().tolist()) == {0, 255}
        # Without a colour wanted, the first font that has the character draws it.
        plain = PixelProcessor(FONT, max_patches=L, mode="gray")(f"a {GRIN} b").pixel_values[0]
        assert torch.equal(gray, plain)
        only = PixelProcessor(colour, max_patches=L, mode="gray")(GRIN).pixel_values[0]
        assert 76 in only and 29 in only  # luma of red and of blue

    def test_colours_are_clipped_and_wrapped(self, colour):
        processor = PixelProcessor([FONT, colour], max_patches=8)
        batch = processor(f"{GRIN} " * 40, return_offsets_mapping=True)
        assert batch.num_patches.tolist() == [7]
        assert (batch.pixel_values[..., -16:] == 0).all()
        assert torch.equal(processor(f"{GRIN} " * 40).pixel_values, batch.pixel_values)
        parts = processor.wrap(f"{GRIN} " * 40)
        assert "".join(parts).count(GRIN) == 40

    def test_bitmaps_are_scaled_by_area(self):
        pixels = np.arange(256, dtype=np.uint8).reshape(8, 8, 4)
        half, left, top = scaled(pixels, (Fraction(1), Fraction(4)), (Fraction(-3), Fraction(4)))
        assert (left, top) == (1, -3) and half.shape == (4, 4, 4)
        assert np.array_equal(
            half, (pixels.reshape(4, 2, 4, 2, 4).astype(int).sum((1, 3)) + 2) // 4
        )
        full = np.full((7, 5, 4), 255, np.uint8)
        third, left, top = scaled(
            full, (Fraction(-1, 2), Fraction(7, 3)), (Fraction(1, 4), Fraction(3))
        )
        assert (left, top) == (-1, 0) and third.shape == (4, 3, 4)
        assert abs(third[..., 0].sum() / 255 - 7) < 0.05  # the area of the rectangle

    @pytest.mark.parametrize("script, text", [
        ("Devanagari", "हि\u0928\u094dदी"), ("Thai", "ภาษาไทย"), ("Bengali", "বাংলা"), ("Chinese", "中文"),
    ])  # fmt: skip
    def test_other_scripts(self, script, text):
        processor = PixelProcessor(max_patches=L, on_missing="error")
        if any(
            processor._typesetter.maker.chain.choose(text[a:b]) is None for a, b in clusters(text)
        ):
            pytest.skip(f"needs a font of {script}")
        batch = processor([text, f"abc {text}"], return_offsets_mapping=True)
        assert (batch.pixel_values < 128).flatten(1).any(1).all()
        if (
            script == "Devanagari"
        ):  # the vowel sign I stands before its consonant, and both are one cluster
            assert processor.width(text) < sum(processor.width(c) for c in text if c != "\u094d")


class TestSaved:
    TEXT = "Saved and loaded."

    def test_round_trip(self, tmp_path, colour):
        made = PixelProcessor(FONT, max_patches=L, mode="gray", font_size=7.5)
        made.save_pretrained(tmp_path)
        loaded = PixelProcessor.from_pretrained(tmp_path)
        assert loaded.settings == made.settings
        assert torch.equal(loaded(self.TEXT).pixel_values, made(self.TEXT).pixel_values)
        changed = PixelProcessor.from_pretrained(tmp_path, max_patches=8, mode="rgb")
        assert changed(self.TEXT).pixel_values.shape == (1, 3, 16, 128)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        assert saved["fonts"] == [{"file": FONT.name, "index": 0, "sha256": FontFile(FONT).sha256}]
        assert set(saved["versions"]) == {"harfbuzz", "freetype", "unicode"}

    def test_auto_processor(self, tmp_path):
        from transformers import AutoProcessor

        register()
        PixelProcessor(FONT, max_patches=L).save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is PixelProcessor and loaded.settings.max_patches == L
        assert AutoProcessor.from_pretrained(tmp_path, max_patches=9).settings.max_patches == 9

    def test_fonts_travel_along(self, tmp_path, colour):
        PixelProcessor([FONT, colour], max_patches=L).save_pretrained(tmp_path, copy_fonts=True)
        loaded = PixelProcessor.from_pretrained(tmp_path)
        assert loaded.fonts[1].path == tmp_path / "colour.ttf"

    def test_another_font(self, tmp_path, folder, colour):
        mine = Path(shutil.copy(colour, tmp_path / "own.ttf"))
        PixelProcessor([FONT, mine], max_patches=L).save_pretrained(tmp_path / "saved")
        assert (
            PixelProcessor.from_pretrained(tmp_path / "saved").fonts[1].path == mine
        )  # where it was
        mine.unlink()
        with pytest.raises(
            RendererMismatch, match=r"missing: own.ttf; looked in .*TENFOLD_FONTS.*verify='warn'"
        ):
            PixelProcessor.from_pretrained(tmp_path / "saved")
        shutil.copy(folder / "other" / "colour.ttf", mine)
        told = r"another file than the one saved is .*own.ttf \(SHA-256 saved: [0-9a-f]{64}\)"
        with pytest.raises(RendererMismatch, match=told):
            PixelProcessor.from_pretrained(tmp_path / "saved")
        with pytest.warns(UserWarning, match="is not the same here"):
            left = PixelProcessor.from_pretrained(tmp_path / "saved", verify="warn")
        assert [f.path for f in left.fonts] == [FONT]
        with pytest.raises(
            RendererMismatch,
            match=r"the fonts given are not those saved, DejaVuSans\.ttf, own\.ttf",
        ):
            PixelProcessor.from_pretrained(tmp_path / "saved", fonts=FONT)
        assert (
            len(PixelProcessor.from_pretrained(tmp_path / "saved", fonts=[FONT, colour]).fonts) == 2
        )

    def test_other_pixels(self, tmp_path):
        PixelProcessor(FONT, max_patches=L).save_pretrained(tmp_path)
        file = tmp_path / "processor_config.json"
        saved = json.loads(file.read_text())
        saved["versions"]["freetype"] = "2.0.1"
        file.write_text(json.dumps(saved))
        PixelProcessor.from_pretrained(tmp_path)  # another version that draws the same
        saved["probe"] = "0" * 64
        file.write_text(json.dumps(saved))
        with pytest.raises(
            RendererMismatch, match=r"draw other pixels here \(freetype 2.0.1 there, "
        ):
            PixelProcessor.from_pretrained(tmp_path)
        PixelProcessor.from_pretrained(tmp_path, verify="off")

    def test_what_is_no_saved_processor(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no saved PixelProcessor"):
            PixelProcessor.from_pretrained(tmp_path)
        for text, told in (("{", "is not the configuration"), ('{"processor_class": "Other", "format": 1, '
                           '"settings": {}, "fonts": []}', "is of a Other, format 1")):  # fmt: skip
            (tmp_path / "processor_config.json").write_text(text)
            with pytest.raises(ValueError, match=told):
                PixelProcessor.from_pretrained(tmp_path)
        PixelProcessor(FONT).save_pretrained(tmp_path)
        with pytest.raises(TypeError, match="no argument size"):
            PixelProcessor.from_pretrained(tmp_path, size=3)


class TestPictures:
    def test_folding(self):
        strip = torch.arange(6).repeat_interleave(16).to(torch.uint8).expand(3, 16, 96)
        made = strip_picture(strip, wrap=4, gap=2)
        assert made.shape == (34, 64, 3)
        assert made[0, ::16, 0].tolist() == [0, 1, 2, 3] and made[18, :32:16, 0].tolist() == [4, 5]
        assert tuple(made[18, 40]) == tuple(made[16, 0]) == (225, 228, 235)
        assert strip_picture(strip, wrap=4, num_patches=1, scale=3).shape == (48, 96, 3)
        for form in (
            strip.permute(1, 2, 0),
            strip[0],
            strip[:1],
            strip.numpy(),
            strip.float() / 255,
        ):
            assert np.array_equal(strip_picture(form, wrap=4, gap=2), made)

    @pytest.mark.parametrize("strip, told", [
        (torch.zeros(2, 16, 32, dtype=torch.uint8), "a strip is"), (torch.full((3, 16, 32), 1.5), "clamp"),
        (torch.zeros(3, 16, 32, dtype=torch.int32), "uint8 or float"),
    ])  # fmt: skip
    def test_bad(self, strip, told):
        with pytest.raises(ValueError, match=told):
            strip_picture(strip)

    def test_command(self, tmp_path):
        (tmp_path / "lines.txt").write_text("one line\n\nanother line\n")
        text = succeeds(
            "pixelgpt",
            "render",
            "Some text",
            "--out",
            tmp_path / "a.png",
            "--font",
            FONT,
            "--scale",
            1,
        )
        assert "1 strip of 5 patches" in text or "1 strip of 6 patches" in text
        with Image.open(tmp_path / "a.png") as image:
            assert image.size[1] == 16 and image.size[0] % 16 == 0
        found = json.loads(succeeds("pixelgpt", "render", tmp_path / "lines.txt", "--out", tmp_path / "b.png", "--font",
                                    FONT, "--words", "--mode", "binary", "--grid", "--json"))  # fmt: skip
        assert (
            len(found["num_patches"]) == 2
            and found["fonts"] == [FONT.name]
            and Path(found["picture"]).is_file()
        )
        found = json.loads(succeeds("pixelgpt", "render", "a \ue123", "--pair", "b", "--out", tmp_path / "c.png",
                                    "--font", FONT, "--json"))  # fmt: skip
        assert len(found["sep_patches"][0]) == 2 and "U+E123" in found["warnings"][0]
        assert "does not exist" in fails(
            "pixelgpt", "render", "a", "--out", tmp_path / "d.png", "--font", "no.ttf"
        )
        assert "no font has U+E123" in fails("pixelgpt", "render", "\ue123", "--out", tmp_path / "d.png",
                                             "--font", FONT, "--on-missing", "error")  # fmt: skip

    def test_write(self, tmp_path):
        made = strip_picture(PixelProcessor(FONT, max_patches=L)("text").pixel_values[0])
        with Image.open(write_png(made, tmp_path / "deep" / "x.png")) as image:
            assert np.array_equal(np.array(image), made)
