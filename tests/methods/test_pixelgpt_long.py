# SPDX-License-Identifier: Apache-2.0
"""``PixelProcessor``: long texts, offsets, threads, workers, speed."""

import pickle
import time
from itertools import pairwise

import pytest
import torch

from tenfold.pixelgpt import PixelCollator, PixelProcessor, packed_batches
from tenfold.pixelgpt.fonts import packaged_font

FONT = packaged_font()
L = 32
W = 16 * L
ARABIC = "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645"
UNKNOWN = "\ue123"  # private use
TEXTS = [
    "A short text.",
    "Grüße, Γειά, Привет",
    ARABIC,
    "two  spaces ",
    "\U0001f600 face",
    "x" * 200,
]


@pytest.fixture(scope="module")
def processor():
    return PixelProcessor(FONT, max_patches=L)


class TestLong:
    TEXT = " ".join(f"word{i} in a longer text," for i in range(60))

    @pytest.mark.parametrize("stride", [0, 6])
    def test_wrap(self, processor, stride):
        batch = processor(
            ["short", self.TEXT], overflow="wrap", stride=stride, return_offsets_mapping=True
        )
        assert batch.overflow_to_sample_mapping.tolist() == [0] + [1] * (len(batch.num_patches) - 1)
        spans = [
            (int(o[o[:, 1] > 0, 0].min()), int(o[:, 1].max())) for o in batch.offset_mapping[1:]
        ]
        assert spans[0][0] == 0 and spans[-1][1] == len(self.TEXT)
        for (a, b), (c, _) in pairwise(spans):
            again = self.TEXT[c:b]
            assert a < c and processor.width(again) <= 16 * stride
            assert (c > b) if stride == 0 else (c < b)
        parts = processor.wrap(self.TEXT, stride)
        assert max(map(processor.width, parts)) <= W - 32
        assert torch.equal(processor(parts).pixel_values, batch.pixel_values[1:])

    def test_wrap_of_a_pair(self, processor):
        batch = processor(
            ("question?", self.TEXT),
            overflow="wrap",
            return_sep_patches=True,
            return_offsets_mapping=True,
        )
        assert len({s[0] for s in batch.sep_patches}) == 1 and len(batch.num_patches) > 3
        firsts = batch.pixel_values[..., : 16 * batch.sep_patches[0][0]]
        assert (firsts == firsts[:1]).all()
        second = batch.sequence_ids == 1
        assert int(batch.offset_mapping[second][:, 1].max()) == len(self.TEXT)
        with pytest.raises(ValueError, match="first text of pair 0 leaves no room"):
            processor((self.TEXT, "b"), overflow="wrap")

    def test_words_wider_than_a_strip(self, processor):
        word = "".join(chr(97 + i % 26) for i in range(700))
        parts = processor.wrap(f"a {word} b")
        assert " ".join(parts).replace(" ", "") == f"a{word}b" and len(parts) > 5
        assert all(processor.width(p) <= W - 32 for p in parts)
        marks = "e" + "\u0301" * 200
        assert "".join(processor.wrap(marks)) == marks

    def test_pack(self, processor):
        lines = [f"line {i} has some words" for i in range(40)] + ["", "\n", "word " * 40]
        packed = list(processor.pack(lines))
        assert " ".join(packed) == " ".join(x.strip() for x in lines if x.strip())
        widths = [processor.width(p) for p in packed]
        assert max(widths) <= W - 32 and len(packed) < len(lines) / 1.5
        for here, after in pairwise(packed[:10]):  # another line would not have fit
            following = next(x for x in lines if after == x or after.startswith(f"{x} line"))
            assert processor.width(f"{here} {following}") > W - 32
        batches = list(packed_batches(processor, lines, batch_size=4, padding="longest"))
        assert [len(b.num_patches) for b in batches[:-1]] == [4] * (len(batches) - 1)
        assert sum(len(b.num_patches) for b in batches) == len(packed)

    def test_a_megabyte(self):
        processor = PixelProcessor(FONT)
        words = [
            f"{w}{i % 97}"
            for i, w in enumerate(
                ["lorem", "\u0438\u043f\u0441\u0443\u043c", "dolor", "sit,"] * 40000
            )
        ]
        text = " ".join(words)
        assert len(text.encode()) > 1 << 20
        start = time.perf_counter()
        parts = processor.wrap(text)
        assert processor(text).num_patches.tolist() == [1023] and processor(
            "x" * (1 << 20)
        ).num_patches.tolist() == [1023]
        assert time.perf_counter() - start < 20
        assert " ".join(parts) == text and 350 < len(parts) < 800
        held = processor._typesetter
        assert len(held._words) <= 1 << 14 and len(held._parts) <= 1 << 14


class TestOffsets:
    def test_left_to_right(self, processor):
        text = "some words in a row"
        offsets = processor(text, return_offsets_mapping=True).offset_mapping[0]
        n = int(processor(text).num_patches)
        for i, (first, end) in enumerate(offsets[:n].tolist()):
            low, high = 16 * i - 2, 16 * i + 14  # pixels of the text
            assert processor.width(text[: first + 1]) >= max(low, 0) - 1
            assert processor.width(text[: end - 1]) <= high + 1
        assert offsets[:n, 0].tolist() == sorted(offsets[:n, 0].tolist()) and int(
            offsets[n - 1, 1]
        ) == len(text)
        assert (offsets[n:] == 0).all()

    def test_right_to_left(self, processor):
        offsets = processor(ARABIC * 2, return_offsets_mapping=True).offset_mapping[0]
        shown = offsets[offsets[:, 1] > 0]
        assert int(shown[0, 1]) == len(ARABIC * 2) and int(shown[-1, 0]) == 0
        assert shown[:, 0].tolist() == sorted(shown[:, 0].tolist(), reverse=True)

    def test_pair_and_words(self, processor):
        pair = processor(("ab", "cde"), return_offsets_mapping=True)
        at = processor(("ab", "cde"), return_sep_patches=True).sep_patches[0]
        assert pair.sequence_ids[0, : at[1] + 1].tolist() == [0, 0, -1, 1, 1, -1] and at == [2, 5]
        assert pair.offset_mapping[0, : at[1]].tolist() == [[0, 2], [1, 2], [0, 0], [0, 2], [1, 3]]
        words = processor(
            [["one", "two", "three"]], return_offsets_mapping=True, return_sep_patches=True
        )
        assert [int(words.sequence_ids[0, s]) for s in words.word_starts[0]] == [0, 1, 2]
        assert words.offset_mapping[0, words.word_starts[0][2]].tolist()[0] == 0


class TestThreads:
    def test_memory_is_used_again_when_nobody_has_it(self):
        processor = PixelProcessor(FONT)
        texts = [f"text {i}" for i in range(24)]  # 19 MB
        first = processor(texts)
        kept, view = first.pixel_values.clone(), first.pixel_values[3, :, :, 5:9]
        place = first.pixel_values.data_ptr()
        del first
        others = [processor([f"other {i}"] * 24) for i in range(4)]  # the view still lives
        assert torch.equal(view, kept[3, :, :, 5:9]) and place not in {
            b.pixel_values.data_ptr() for b in others
        }
        assert all(
            torch.equal(b.pixel_values[0], processor(f"other {i}").pixel_values[0])
            for i, b in enumerate(others)
        )
        place = others[-1].pixel_values.data_ptr()
        real = others[-1].pixel_values.numpy()[:1]
        others.pop()
        assert processor(texts).pixel_values.data_ptr() != place
        del real
        again = [processor(texts), processor(texts)]
        assert place in {b.pixel_values.data_ptr() for b in again}
        assert all(torch.equal(b.pixel_values, kept) for b in again)

    def test_same_bytes(self, processor):
        texts = [f"text number {i} {'more ' * (i % 7)}" for i in range(50)]
        fresh = PixelProcessor(FONT, max_patches=L)
        want = processor(texts, num_threads=1)
        for n in (2, 3, 64):
            got = fresh(texts, num_threads=n)
            assert torch.equal(got.pixel_values, want.pixel_values) and torch.equal(
                got.num_patches, want.num_patches
            )

    def test_an_error_in_a_thread_is_raised(self):
        with pytest.raises(ValueError, match="no font has"):
            PixelProcessor(FONT, on_missing="error", max_patches=L)(
                ["a"] * 7 + [UNKNOWN], num_threads=4
            )

    def test_workers_of_a_loader(self, processor):
        rows = [{"text": f"row {i}", "other": "b", "label": i % 3} for i in range(6)]
        collate = PixelCollator(processor, text_pair="other", label="label")
        processor(["warm", "pool"], num_threads=2)  # a pool does not live on in a fork
        loader = torch.utils.data.DataLoader(
            rows, 2, collate_fn=collate, num_workers=2, multiprocessing_context="fork"
        )
        batches = list(loader)
        assert torch.cat([b["labels"] for b in batches]).tolist() == [r["label"] for r in rows]
        want = processor([r["text"] for r in rows], ["b"] * 6).pixel_values
        assert torch.equal(torch.cat([b["pixel_values"] for b in batches]), want)
        again = pickle.loads(pickle.dumps(processor))
        assert torch.equal(again(TEXTS).pixel_values, processor(TEXTS).pixel_values)

    def test_faster_than_drawing_the_whole_canvas(self):
        from tenfold.pixelgpt import speed

        rows = {r["provider"]: r for r in speed.measure([200], [1], count=8, rounds=3)}
        assert rows["tenfold"]["ratio"] > 2, rows
