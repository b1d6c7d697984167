# SPDX-License-Identifier: Apache-2.0
"""``PixelProcessor``: geometry, text of all kinds, long texts, offsets, threads. Spec section 10, check 10."""

import hashlib
import os
import subprocess
import sys
import warnings

import numpy as np
import pixelgpt_golden as golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.pixelgpt import (
    MissingGlyphWarning,
    PixelProcessor,
    next_patch,
    patch_mask,
)
from tenfold.pixelgpt.bidi import embedding_levels
from tenfold.pixelgpt.bidi_classes import all_right
from tenfold.pixelgpt.fonts import packaged_font
from tenfold.pixelgpt.typeset import LONGEST, clean

FONT = packaged_font()
L = 32
W = 16 * L
ARABIC = "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645"
HEBREW = "\u05e9\u05dc\u05d5\u05dd"
UNKNOWN = "\ue123"  # private use
TEXTS = ["A short text.", "Grüße, Γειά, Привет", ARABIC, f"mixed {HEBREW} text 12",
         "two  spaces ", "tab\tand\nline", "\U0001f600 face", "x" * 200, "word " * 60]  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    return PixelProcessor(FONT, max_patches=L)


def black(strip):
    """Patches that are all black."""
    return np.flatnonzero(strip.numpy().reshape(3, 16, -1, 16).max((0, 1, 3)) == 0).tolist()


class TestGeometry:
    """Spec sections 3.1 and 3.2."""

    def test_shapes_and_types(self, processor):
        batch = processor(TEXTS)
        assert (
            batch.pixel_values.shape == (len(TEXTS), 3, 16, W)
            and batch.pixel_values.dtype == torch.uint8
        )
        assert batch.patch_mask.shape == (len(TEXTS), L) and batch.patch_mask.dtype == torch.bool
        assert batch.num_patches.dtype == torch.int64 and set(batch) == {
            "pixel_values",
            "patch_mask",
            "num_patches",
        }
        assert torch.equal(batch.patch_mask.sum(1), (batch.num_patches + 1).clamp(max=L))
        one = processor(TEXTS[0])
        assert torch.equal(one.pixel_values[0], batch.pixel_values[0])
        real = processor(TEXTS[0], dtype="float32").pixel_values
        assert real.dtype == torch.float32 and torch.equal(real, one.pixel_values.float() / 255)

    @pytest.mark.parametrize("text", TEXTS)
    def test_single(self, processor, text):
        width = min(processor.width(text), W - 2)
        end = next_patch(2 + width + 2, 16, W)
        batch = processor(text, return_sep_patches=True)
        strip, n = batch.pixel_values[0], int(batch.num_patches[0])
        assert n == end // 16 and batch.sep_patches == [[n]] and black(strip) == [n]
        assert (strip[..., (n + 1) * 16 :] == 255).all() and (strip[..., :2] == 255).all()
        assert strip[..., 2:end].min() < 128

    def test_pair(self, processor):
        a, b = "First text.", "Second one!"
        batch = processor((a, b), return_sep_patches=True)
        s = next_patch(2 + processor.width(a) + 2, 16, W)
        e = next_patch(s + 16 + 2 + processor.width(b) + 2, 16, W)
        assert batch.sep_patches == [[s // 16, e // 16]] == [black(batch.pixel_values[0])]
        assert int(batch.num_patches) == e // 16
        alone = processor(b).pixel_values[0]
        width = processor.width(b)
        assert torch.equal(
            batch.pixel_values[0, ..., s + 18 : s + 18 + width], alone[..., 2 : 2 + width]
        )
        listed = processor([a, a], [b, b])
        assert torch.equal(listed.pixel_values[1], batch.pixel_values[0])

    def test_words(self, processor):
        words = ["Each", "word", "of", "incomprehensibilities", "ends"]
        batch = processor(words, is_split_into_words=True, return_sep_patches=True)
        x, starts = 2, []
        for word in words[:-1]:
            starts.append(x // 16)
            x = next_patch(x + processor.width(word + " "), 16, W)
        starts.append(x // 16)
        end = next_patch(x + processor.width(words[-1]) + 2, 16, W)
        assert batch.word_starts == [starts] and batch.num_patches.tolist() == [end // 16]
        assert torch.equal(processor([words]).pixel_values, batch.pixel_values)
        many = processor([["word"] * 100], return_sep_patches=True)
        assert many.num_patches.tolist() == [L - 1] and 5 < len(many.word_starts[0]) < L

    @pytest.mark.parametrize(
        "given",
        ["long text " * 50, ("long text " * 50, "b"), ("a", "long text " * 50), ["long"] * 90],
    )
    def test_over_long(self, processor, given):
        batch = processor([given])
        assert batch.num_patches.tolist() == [L - 1] and batch.patch_mask.all()
        assert L - 1 in black(batch.pixel_values[0])

    def test_right_to_left_keeps_the_beginning(self, processor):
        long = " ".join([HEBREW] * 80)
        strip = processor(long).pixel_values[0]
        wide = PixelProcessor(FONT, max_patches=8 * L)
        whole, width = wide(long).pixel_values[0], wide.width(long)
        # Reading starts at the right end of the line.
        assert torch.equal(strip[..., 2 : W - 16], whole[..., 2 + width - (W - 2) : 2 + width - 16])

    def test_masks(self):
        assert patch_mask([0, 2, 9], 4).tolist() == [
            [True, False, False, False],
            [True] * 3 + [False],
            [True] * 4,
        ]
        with pytest.raises(ValueError, match="num_patches must be >= 0, got -1"):
            patch_mask([3, -1], 4)

    def test_longest(self, processor):
        texts = ["short", "somewhat longer text"]
        whole, cut = processor(texts), processor(texts, padding="longest")
        n = int(whole.num_patches.max()) + 1
        assert cut.pixel_values.shape[-1] == 16 * n and cut.patch_mask.shape == (2, n)
        assert torch.equal(cut.pixel_values, whole.pixel_values[..., : 16 * n])
        assert (
            processor(texts, padding="longest", pad_to_multiple_of=8).patch_mask.shape[1] % 8 == 0
        )

    def test_no_text_at_all(self, processor):
        assert processor([]).pixel_values.shape == (0, 3, 16, W)


class TestText:
    def test_same_bytes_in_another_process(self, processor):
        code = (
            "import hashlib; from tenfold.pixelgpt import PixelProcessor\n"
            f"p = PixelProcessor({str(FONT)!r}, max_patches={L})\n"
            f"print(hashlib.sha256(p({TEXTS!r}, num_threads=2).pixel_values.numpy().tobytes()).hexdigest())"
        )
        env = {
            **os.environ,
            "LC_ALL": "tr_TR.UTF-8",
            "LANG": "ar",
            "PYTHONHASHSEED": "7",
            "PYTHONUTF8": "1",
        }
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        ours = processor(TEXTS, num_threads=1).pixel_values.numpy().tobytes()
        assert done.stdout.strip() == hashlib.sha256(ours).hexdigest()

    @pytest.mark.parametrize("name", golden.CASES)
    def test_golden(self, name):
        assert np.array_equal(golden.draw(name), golden.committed(name)), (
            f"{name}: see pixelgpt_golden.py"
        )

    def test_composed_and_decomposed_are_the_same(self, processor):
        both = processor(
            ["caf\u00e9 \u1ea4 \u00c5", "cafe\u0301 A\u0302\u0301 A\u030a"]
        ).pixel_values
        assert torch.equal(*both)

    def test_arabic_letters_join(self, processor):
        apart = sum(processor.width(c) for c in ARABIC if c != " ")
        assert processor.width(ARABIC) < 0.9 * apart
        # Lam and alef become one glyph.
        spans = processor(
            ["\u0644\u0627", "\u0644\u0628"], return_offsets_mapping=True
        ).offset_mapping[:, 0]
        assert spans.tolist() == [[0, 2], [0, 2]]
        assert processor.width("\u0644\u0627") < processor.width("\u0644") + processor.width(
            "\u0627"
        )

    def test_order_of_mixed_text(self, processor):
        """The pixels of a line are those of its words in the order in which they are read."""

        def ink(text, a, b):
            return processor(text).pixel_values[0, ..., 2 + a : 2 + b]

        w, h = processor.width("abc "), processor.width(HEBREW)
        assert torch.equal(ink(f"abc {HEBREW}", w, w + h), ink(HEBREW, 0, h))
        turned = ink(f"{HEBREW} abc", 0, w + h)
        assert torch.equal(
            turned[..., : processor.width("abc")], ink("abc", 0, processor.width("abc"))
        )
        assert torch.equal(turned[..., w:], ink(HEBREW, 0, h))
        forced = PixelProcessor(FONT, max_patches=L, direction="rtl")(f"abc {HEBREW}").pixel_values
        assert torch.equal(forced[0, ..., 2 : 2 + h], ink(HEBREW, 0, h))
        assert torch.equal(
            forced[0, ..., 2 + h + processor.width(" ") : 2 + h + w],
            ink("abc", 0, processor.width("abc")),
        )

    def test_controls_are_not_drawn_and_breaks_are_spaces(self, processor):
        want = processor("ab cd ef").pixel_values
        assert torch.equal(processor("a\x00b\tc\x1bd\re\x7ff").pixel_values, want)
        assert torch.equal(processor("ab\ncd\u2028ef").pixel_values, want)
        assert clean("a\x00\n\u200db") == "a\u200b \u200db"

    def test_empty(self, processor):
        for text in ("", "\x00", "\u200d"):
            with pytest.warns(UserWarning, match="nothing is drawn of text 0"):
                batch = processor(text)
            assert batch.num_patches.tolist() == [1] and black(batch.pixel_values[0]) == [1]
            assert batch.patch_mask.sum() == 2
        with pytest.warns(UserWarning, match=r"nothing is drawn of text 1: .* \(so do 1 others"):
            processor(["a", "", ""])

    def test_missing_glyphs(self):
        text = f"a{UNKNOWN}b {UNKNOWN}"
        box = PixelProcessor(FONT, max_patches=L)
        with pytest.warns(
            MissingGlyphWarning, match=r"no font has U\+E123 \(unnamed\); a box is drawn"
        ):
            drawn = box(text).pixel_values
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(box(text).pixel_values, drawn)  # told once
            silent = PixelProcessor(FONT, max_patches=L, on_missing="box")(text).pixel_values
            skipped = PixelProcessor(FONT, max_patches=L, on_missing="skip")
            assert torch.equal(skipped(f"a {UNKNOWN} b").pixel_values, skipped("a  b").pixel_values)
        assert torch.equal(drawn, silent) and not torch.equal(drawn, skipped(text).pixel_values)
        strict = PixelProcessor(FONT, on_missing="error")
        for text, told in (
            (UNKNOWN, r"U\+E123"),
            ("\ud800", r"U\+D800"),
            ("\u4e2d", r"U\+4E2D \(CJK UNIFIED"),
        ):
            with pytest.raises(ValueError, match=f"no font has {told}.*fonts: DejaVuSans.ttf"):
                strict(["fine", text])

    @settings(max_examples=60, deadline=None)
    @given(
        st.text(
            st.one_of(
                st.characters(),
                st.sampled_from(" abc\u0627\u05d0\u0301\u200d\u202e\u2067\U0001f1e9"),
            ),
            max_size=60,
        )
    )
    def test_any_text(self, text):
        processor = self.any_
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = processor(text, return_offsets_mapping=True)
            plain = processor(text)
        n = int(batch.num_patches)
        assert torch.equal(
            batch.pixel_values, plain.pixel_values
        )  # the quick way and the general one
        assert (batch.pixel_values[..., n * 16 : n * 16 + 16] == 0).all()
        assert (batch.pixel_values[..., n * 16 + 16 :] == 255).all() and 1 <= n < L
        first, end = batch.offset_mapping[0].unbind(1)
        assert (first <= end).all() and (end <= len(text)).all()

    @settings(max_examples=40, deadline=None)
    @given(st.text(" ابتלוםשًّ.,(-", max_size=40).map(lambda t: t * 4))
    def test_any_right_to_left_text(self, text):
        setter = self.any_._typesetter
        quick, line = setter.columns(text, 200), setter.line(text, 200)
        if quick is None:
            assert not setter.base(text) or max(map(len, text.split())) > LONGEST
            return
        assert quick == line.columns()
        assert all_right(text) and set(embedding_levels(text, setter.base(text))) <= {
            setter.base(text)
        }

    any_ = PixelProcessor(FONT, max_patches=L, on_missing="box")


class TestModes:
    def test_gray_and_binary(self, processor):
        text = "some gray text"
        gray = PixelProcessor(FONT, max_patches=L, mode="gray")(text).pixel_values
        three = PixelProcessor(FONT, max_patches=L, mode="gray", channels=3)(text).pixel_values
        two = PixelProcessor(FONT, max_patches=L, mode="binary")(text).pixel_values
        rgb = processor(text).pixel_values
        assert gray.shape == (1, 1, 16, W) and len(gray.unique()) > 20
        assert torch.equal(rgb, gray.expand_as(rgb)) and torch.equal(three, rgb)
        assert torch.equal(two, torch.where(gray > 127, 255, 0).to(torch.uint8))

    def test_colours(self, processor):
        ink, paper = (200, 10, 30), (250, 240, 90)
        made = PixelProcessor(FONT, max_patches=L, foreground=ink, background=paper)(
            "text"
        ).pixel_values[0]
        share = processor("text").pixel_values[0, :1].long()
        for c in range(3):
            want = (ink[c] * (255 - share[0]) + paper[c] * share[0] + 127) // 255
            n = int(processor("text").num_patches) * 16
            assert torch.equal(made[c, :, :n].long(), want[:, :n])
            assert (made[c, :, n : n + 16] == 0).all() and (made[c, :, n + 16 :] == paper[c]).all()
        gray = PixelProcessor(FONT, max_patches=L, foreground=ink, background=paper, mode="gray")(
            "text"
        ).pixel_values
        assert gray[0, 0, 0, 0] == (299 * 250 + 587 * 240 + 114 * 90 + 500) // 1000

    def test_sizes(self):
        big = PixelProcessor(FONT, max_patches=L, patch_size=32, font_size=16)
        assert big("Text").pixel_values.shape == (1, 3, 32, 32 * L)
        assert (
            abs(big.width("Text of a length") - 2 * PixelProcessor(FONT).width("Text of a length"))
            <= 6
        )

    def test_features(self):
        on, off = (
            PixelProcessor(FONT, max_patches=L, features=f) for f in ((), ("-kern", "-liga"))
        )
        assert not torch.equal(on("AVAVA fi").pixel_values, off("AVAVA fi").pixel_values)

    @pytest.mark.parametrize("wrong, error, told", [
        ({"mode": "cmyk"}, ValueError, "mode must be one of rgb, gray, binary"),
        ({"channels": 1}, ValueError, "channels must be 3 with mode 'rgb'"),
        ({"max_patches": 1}, ValueError, "max_patches must be >= 2"),
        ({"patch_size": 16.0}, TypeError, "patch_size must be an integer"),
        ({"font_size": 0}, ValueError, "font_size must be a positive number"),
        ({"font_size": 80}, ValueError, "over four times patch_size"),
        ({"foreground": (0, 0, 256)}, ValueError, "foreground must be three integers of 0 to 255"),
        ({"on_missing": "cry"}, ValueError, "on_missing must be one of warn, box, skip, error"),
        ({"features": "-kern"}, TypeError, "features must be OpenType tags"),
        ({"colour": 1}, TypeError, "PixelProcessor has no setting colour; it has font_size"),
        ({"fonts": []}, ValueError, "at least one font file"),
        ({"fonts": "no/such.ttf"}, FileNotFoundError, "font file 'no/such.ttf' does not exist"),
    ])  # fmt: skip
    def test_bad_settings(self, wrong, error, told):
        with pytest.raises(error, match=told):
            PixelProcessor(**{"fonts": FONT, **wrong})

    @pytest.mark.parametrize("call, error, told", [
        ((3,), TypeError, "got a int as text 0"),
        ((["a", None],), TypeError, "got a NoneType as text 1"),
        ((["a", ("b", "c", "d")],), TypeError, "got a tuple of 3: str, str, str as text 1"),
        (([["a", 1]],), TypeError, "got a list of 2: str, int as text 0"),
        ((["a"], ["b", "c"]), ValueError, "text has 1 texts, text_pair 2"),
        (("a", ["b"]), TypeError, "both be a str or both a list"),
    ])  # fmt: skip
    def test_bad_text(self, processor, call, error, told):
        with pytest.raises(error, match=told):
            processor(*call)

    def test_bad_options(self, processor):
        for options, told in (({"padding": "yes"}, "padding must be one of"), ({"stride": -1}, "stride must be >= 0"),
                              ({"num_threads": 0}, "num_threads must be >= 1"), ({"overflow": "no"}, "overflow"),
                              ({"dtype": "int8"}, "dtype must be one of")):  # fmt: skip
            with pytest.raises(ValueError, match=told):
                processor("a", **options)
