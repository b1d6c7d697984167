# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF's segmenters: random lengths, perplexity, callbacks, text with its fallback, and bad input."""

import pytest
import torch
from ma_rlhf_cases import NAN, rollout

from tenfold.ma_rlhf import MARLHFConfig, make_segmenter, prepare

FULL = torch.ones(1, 100, dtype=torch.bool)
CAT = "(S (NP The cat) (VP sat (PP on (NP the red mat))) .)"


def make(kind, tokenizer=None, **settings):
    extra = {k: settings.pop(k) for k in ("parser", "callback") if k in settings}
    return make_segmenter(MARLHFConfig(termination=kind, **settings), tokenizer, **extra)


def lengths(seg):
    return [torch.bincount(row[row >= 0]).tolist() for row in seg]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class TestRandom:
    """Check 13."""

    def test_the_papers_set(self):
        cut = make("random")
        seg, nseg = cut(FULL, generator=seeded(1))
        (row,) = lengths(seg)
        assert (
            sorted(row[:12]) == sorted([2, 3, 5, 10] * 3)
            and row[12:] == [40]
            and nseg.tolist() == [13]
        )

    def test_the_published_codes_set(self):
        cut = make_segmenter(MARLHFConfig.from_preset("reference", termination="random", repeat=2))
        (row,) = lengths(cut(FULL, generator=seeded(1))[0])
        assert sorted(row[:10]) == sorted([1, 2, 3, 5, 10] * 2) and row[10:] == [
            57,
            1,
        ]  # 42 tokens, and the last one

    def test_same_state_same_cut(self):
        cut, mask = make("random"), FULL.expand(4, 100)
        one, two = (cut(mask, generator=seeded(3))[0] for _ in range(2))
        assert torch.equal(one, two) and not torch.equal(one, cut(mask, generator=seeded(4))[0])
        assert len({tuple(r) for r in lengths(one)}) == 4  # rows are drawn apart

    def test_a_generator_goes_on(self):
        cut, mask, generator = make("random"), FULL.expand(4, 100), seeded(3)
        whole = cut(mask, generator=seeded(3))[0]
        parts = [cut(mask[:1], generator=generator)[0], cut(mask[1:], generator=generator)[0]]
        assert torch.equal(torch.cat(parts), whole)

    def test_keys(self):
        """The cut of a row is a function of its key and the seed: not of the batch, nor of the rank."""
        cut, mask, keys = (
            make("random"),
            FULL.expand(6, 100),
            torch.tensor([5, 9, 2**40 + 5, 7, 2**40 + 1, 9]),
        )
        whole = cut(mask, keys=keys)[0]
        assert torch.equal(whole, cut(mask, keys=keys, generator=seeded(1))[0])
        order = torch.tensor([4, 2, 0])
        assert torch.equal(cut(mask[:3], keys=keys[order])[0], whole[order])
        assert torch.equal(whole[1], whole[5]) and len({tuple(r) for r in lengths(whole)}) == 5
        assert not torch.equal(make("random", seed=7)(mask, keys=keys)[0], whole)
        for row in lengths(whole):
            assert sorted(row[:12]) == sorted([2, 3, 5, 10] * 3)

    def test_orders_are_fair(self):
        cut = make("random", lengths=(1, 2), repeat=1)
        row = cut(FULL[:, :3].expand(4000, 3), keys=torch.arange(4000))[0]
        assert abs((row[:, 1] == 1).float().mean() - 0.5) < 0.03

    def test_recycle(self):
        (row,) = lengths(make("random", tail="recycle")(FULL, keys=torch.tensor([1]))[0])
        assert sum(row) == 100 and row[12:19] == row[: len(row[12:19])] and sum(row[:12]) == 60

    def test_errors(self):
        cut = make("random")
        with pytest.raises(
            ValueError, match=r"random macro actions need keys .* or a CPU generator"
        ):
            cut(FULL)
        with pytest.raises(ValueError, match=r"keys must be integers \[1\], got torch.int64 \[2\]"):
            cut(FULL, keys=torch.arange(2))
        with pytest.raises(ValueError, match=r"keys must be integers \[1\], got torch.float32"):
            cut(FULL, keys=torch.zeros(1))

    def test_through_prepare(self):
        config = MARLHFConfig(termination="random", min_response=1)
        data = rollout(rows=4, width=60)
        one = prepare(config, make_segmenter(config), keys=torch.arange(4), **data)
        two = prepare(config, make_segmenter(config), keys=torch.arange(4), **data)
        assert torch.equal(one.seg, two.seg)
        with pytest.raises(ValueError, match="random macro actions need"):
            prepare(config, make_segmenter(config), **data)


class TestPerplexity:
    LOGP = -torch.tensor([[5, 4, 6, 3, 2, 2.5, NAN, NAN]]).log()
    MASK = torch.arange(8)[None] < 6

    def test_last_one_alone(self):
        seg, nseg = make("ppl", isolate_last=True)(self.MASK, logp_ref=self.LOGP)
        assert lengths(seg) == [[2, 3, 1]] and nseg.tolist() == [3]
        seg, _ = make("ppl", ppl_mode="token_rise", isolate_last=True)(
            self.MASK, logp_ref=self.LOGP
        )
        assert lengths(seg) == [[2, 3, 1]]  # it begins one already
        assert seg[0, 6:].tolist() == [-1, -1]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"termination='ppl' needs logp_ref \[B, R\]"):
            make("ppl")(FULL)


class TestCustom:
    MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()
    STARTS = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0]]).bool()

    def test_starts(self):
        seg, nseg = make("custom", callback=lambda mask, **_: self.STARTS)(self.MASK)
        assert seg.tolist() == [
            [0, 0, 1, 1, 1, -1],
            [-1] * 6,
            [0, 0, -1, 0, 1, 1],
        ] and nseg.tolist() == [2, 0, 2]

    @pytest.mark.parametrize("holes", ["bridge", "split"])
    def test_last_one_alone(self, holes):
        seg, nseg = make(
            "custom", callback=lambda mask, **_: self.STARTS.int(), isolate_last=True, holes=holes
        )(self.MASK)
        rest = [0, 0, -1, 0, 1, 2] if holes == "bridge" else [0, 0, -1, 1, 2, 3]
        assert seg.tolist() == [[0, 0, 1, 1, 2, -1], [-1] * 6, rest] and nseg.tolist() == [
            3,
            0,
            3 if holes == "bridge" else 4,
        ]

    def test_a_callback_sees_the_rollout(self):
        seen = {}

        def callback(mask, **given):
            seen.update(given)
            return given["ids"] == 7

        config = MARLHFConfig(termination="custom", min_response=1)
        data = rollout(rows=2, width=6, lengths=[6, 4]) | {
            "ids": torch.tensor([[1, 7, 1, 7, 1, 1]] * 2),
            "texts": ["a", "b"],
        }
        exp = prepare(config, make_segmenter(config, callback=callback), **data)
        assert lengths(exp.seg) == [[1, 2, 3], [1, 2, 1]]
        assert set(seen) == {"ids", "logp_ref", "texts"} and seen["texts"] == ["a", "b"]
        assert seen["logp_ref"].isfinite().all()

    def test_errors(self):
        with pytest.raises(ValueError, match="termination='custom' needs callback="):
            make("custom")
        with pytest.raises(TypeError, match="bool tensor of starts, got list"):
            make("custom", callback=lambda mask, **_: [1])(self.MASK)
        with pytest.raises(TypeError, match=r"bool tensor of starts, got torch\.float32"):
            make("custom", callback=lambda mask, **_: mask.float())(self.MASK)
        with pytest.raises(ValueError, match=r"starts must be \[3, 6\], got \[3, 5\]"):
            make("custom", callback=lambda mask, **_: mask[:, 1:])(self.MASK)


class Words:
    """A tokenizer whose ids are places in a list of texts; the last one is the end token."""

    def __init__(self, *words):
        self.words = [*words, "</s>"]

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        end = len(self.words) - 1
        return "".join(self.words[i] for i in ids if i != end or not skip_special_tokens)

    def rows(self, *rows):
        width = max(map(len, rows))
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
        return ids, torch.arange(width) < torch.tensor([len(r) for r in rows])[:, None]


class TestText:
    CAT = Words("The", " cat", " sat", " on", " the", " red", " mat", ".", " Yes", "!", "\n")

    def parser(self, sentence):
        trees = {"The cat sat on the red mat.": CAT, "Yes!": "(S Yes !)"}
        return trees.get(sentence, "(S other words)")

    def test_parsing(self):
        ids, mask = self.CAT.rows([0, 1, 2, 3, 4, 5, 6, 7, 11], [8, 9, 10, 0, 1, 2, 3, 4, 5, 6, 7])
        cut = make("parsing", self.CAT, parser=self.parser)
        seg, nseg = cut(mask, ids=ids)
        assert lengths(seg) == [[3, 6], [3, 3, 5]] and nseg.tolist() == [2, 3]
        assert cut.fallback.tolist() == [False, False]

    def test_padding_and_holes_are_not_read(self):
        ids, mask = self.CAT.rows([0, 1, 9, 2, 3, 4, 5, 6, 7, 11])
        mask[0, 2] = False  # the tool's output
        seg, _ = make("parsing", self.CAT, parser=self.parser)(mask, ids=ids)
        assert seg[0].tolist() == [0, 0, -1, 0, 1, 1, 1, 1, 1, 1]

    def test_rows_that_do_not_fit_fall_back_and_are_counted(self):
        ids, mask = self.CAT.rows([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 7], [9, 9], [8, 9])
        mask = torch.cat([mask, torch.zeros_like(mask[:1])])  # and an empty row
        ids = torch.cat([ids, ids[:1]])
        cut = make("parsing", self.CAT, parser=self.parser, n=2)
        seg, nseg = cut(mask, ids=ids)
        assert lengths(seg)[:4] == [[3, 5], [2, 2, 1], [2], [2]] and nseg.tolist() == [
            2,
            3,
            1,
            1,
            0,
        ]
        assert cut.fallback.tolist() == [False, True, True, False, False]
        seg, _ = make("parsing", self.CAT, parser=self.parser, n=None)(mask, ids=ids)
        assert lengths(seg)[1] == [5]

    def test_or_are_an_error(self):
        ids, mask = self.CAT.rows([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 7])
        cut = make("parsing", self.CAT, parser=self.parser, on_mismatch="error")
        with pytest.raises(
            ValueError, match="row 1: the parser's word 'other' is not in the response"
        ):
            cut(mask, ids=ids)

    def test_experience_has_the_fallbacks(self):
        config = MARLHFConfig(termination="parsing", min_response=1)
        ids, mask = self.CAT.rows([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 7])
        data = rollout(rows=2, width=8, lengths=[8, 5])
        assert torch.equal(data["mask"], mask)
        exp = prepare(config, make_segmenter(config, self.CAT, parser=self.parser), ids=ids, **data)
        assert exp.fallback.tolist() == [False, True] and lengths(exp.seg) == [[3, 5], [5]]

    def test_sentences_and_statements(self):
        ids, mask = self.CAT.rows([0, 1, 7, 8, 9, 10, 0, 11])
        seg, _ = make("sentence", self.CAT)(mask, ids=ids)
        assert lengths(seg) == [[3, 3, 2]]
        seg, _ = make("sentence", self.CAT, isolate_last=True)(mask, ids=ids)
        assert lengths(seg) == [[3, 3, 1, 1]]
        code = Words("a", " =", " 1", "\n", "b", " = (")
        ids, mask = code.rows([0, 1, 2, 3, 4, 1, 2, 6], [4, 5])
        cut = make("statement", code)
        seg, _ = cut(mask, ids=ids)
        assert lengths(seg) == [[4, 4], [2]] and cut.fallback.tolist() == [False, True]

    def test_errors(self):
        for kind in ("parsing", "sentence", "statement"):
            with pytest.raises(
                ValueError, match=f"termination='{kind}' needs the policy's tokenizer"
            ):
                make(kind)
        cut = make("sentence", self.CAT)
        with pytest.raises(ValueError, match=r"macro actions of text need ids \[B, R\]"):
            cut(FULL)
        with pytest.raises(ValueError, match=r"ids must be \[1, 100\] as the mask, got \[1, 99\]"):
            cut(FULL, ids=torch.zeros(1, 99, dtype=torch.long))
