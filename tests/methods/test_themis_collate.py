# SPDX-License-Identifier: Apache-2.0
"""Batches of pairs: what is where, padding, packing, observation dropout, bad input."""

import dataclasses
import itertools

import pytest
import themis_cases as cases
import torch

from tenfold.ops import lm_weight, trace_token_class
from tenfold.themis.collate import EncodedPair, collate, dropped, encode_pairs
from tenfold.themis.tokens import byte_tokenizer
from tenfold.themis.traces import EOS, FAILURE, OBSERVATION, Query, Step, Trace, TraceFormat

FORM = TraceFormat(byte_tokenizer(), max_length=None)


def rows_of(batch):
    """Rows without padding: (ids, cls, weights, position ids) lists."""
    names = ("ids", "cls", "weights", "position_ids")
    if "offsets" in batch:
        at = batch["offsets"].tolist()
        return [tuple(batch[n][0, a:b].tolist() for n in names) for a, b in itertools.pairwise(at)]
    return [tuple(batch[n][i][m].tolist() for n in names) for i, m in enumerate(batch["mask"])]


class TestLayout:
    def test_rows(self):
        pairs = cases.some_pairs(3)
        batch = collate(pairs, FORM)
        want = [FORM.assemble(*p.rows()[side]) for side in (0, 1) for p in pairs]
        assert [(r[0], r[1]) for r in rows_of(batch)] == [(w.ids, w.classes) for w in want]
        assert batch["is_pos"].tolist() == [True] * 3 + [False] * 3
        assert batch["asst_start"].tolist() == [w.assistant for w in want]
        assert batch["answer_start"].tolist() == [w.answer[0] for w in want]
        kinds = {k: v.dtype for k, v in batch.items()}
        assert kinds == {"ids": torch.int64, "mask": torch.bool, "cls": torch.int8, "weights": torch.float32,
                         "position_ids": torch.int64, "is_pos": torch.bool, "answer_start": torch.int64,
                         "asst_start": torch.int64}  # fmt: skip
        assert (
            batch["ids"].shape[1] % 8 == 0
            and batch["ids"].shape[1] - max(len(w.ids) for w in want) < 8
        )
        for r in rows_of(batch):
            assert r[3] == list(range(len(r[0]))) and r[1][-1] == EOS and r[0][-1] == FORM.ids.eos
        outside = ~batch["mask"]
        assert (batch["ids"][outside] == FORM.ids.pad).all() and (
            batch["weights"][outside] == 0
        ).all()

    def test_sides_and_packing(self):
        """Check 5, for what goes in: the same rows, whatever lies around them."""
        pairs = cases.some_pairs()
        usual = collate(pairs, FORM, beta=0.5, omega=0.25)
        for options in (
            {"padding_side": "left"},
            {"packed": True},
            {"multiple_of": 1},
            {"multiple_of": 64},
        ):
            other = collate(pairs, FORM, beta=0.5, omega=0.25, **options)
            assert rows_of(other) == rows_of(usual), options
        left = collate(pairs, FORM, padding_side="left")
        assert left["mask"][:, -1].all() and not left["mask"][:, 0].all()
        packed = collate(pairs, FORM, packed=True)
        assert packed["mask"].all() and packed["ids"].shape == (1, int(usual["mask"].sum()))
        assert packed["offsets"].tolist() == [0, *usual["mask"].sum(1).cumsum(0).tolist()]
        one = collate(pairs[2:3], FORM, beta=0.5, omega=0.25)
        assert rows_of(one) == rows_of(usual)[2::5]

    def test_weights(self):
        pairs = [cases.pair()]
        by_class = lambda batch, row: {  # noqa: E731
            int(c): set(batch["weights"][row][batch["cls"][row] == c].tolist()) for c in batch["cls"][row].unique()
        }  # fmt: skip
        batch = collate(pairs, FORM, beta=0.5, omega=0.25)
        assert by_class(batch, 0) == {0: {0.0}, 1: {1.0}, 2: {1.0}, 3: {0.5}, 4: {0.25}, 5: {1.0}}
        assert by_class(batch, 1) == {0: {0.0}, 1: {0.0}, 2: {1.0}, 3: {0.5}, 4: {0.25}, 5: {1.0}}
        assert by_class(collate(pairs, FORM, lm_on_positive=False), 0)[1] == {0.0}
        # beta = 0 hides the observation's text, but not the token that it begins with.
        batch = collate(pairs, FORM, beta=0.0)
        assert batch["weights"][0][batch["ids"][0] == FORM.ids.observation].tolist() == [1.0]

    def test_context_is_no_target(self):
        """The published code counts the ignored part without the context, and cuts it at 512 tokens."""
        form = TraceFormat(byte_tokenizer(), max_length=2000)
        batch = collate([cases.pair(context="c" * 1200)], form)
        for row in range(2):
            first = int((batch["weights"][row] > 0).nonzero()[0])
            text = form.decode(batch["ids"][row, :first].tolist())
            assert len(text) > 1200 and text.endswith(
                "Answer:" if row == 0 else "Answer: It is 5.\n"
            )

    def test_plain_and_without_rationale(self):
        pairs = cases.some_pairs(3)
        batch = collate(pairs, FORM, inputs="plain", obs_dropout=1.0)
        want = [FORM.plain(p.rows()[side][0]) for side in (0, 1) for p in pairs]
        assert (
            [r[0] for r in rows_of(batch)] == want
            and not batch["weights"].any()
            and not batch["cls"].any()
        )
        for options in ({}, {"padding_side": "left"}, {"packed": True}):
            assert rows_of(collate(pairs, FORM, inputs="plain", **options)) == rows_of(batch)
        batch = collate(pairs, FORM, drop_rationale=True, obs_dropout=1.0)
        assert not (batch["cls"] == 4).any() and not (batch["ids"] == FORM.ids.work).any()
        assert all(r[0][-1] == FORM.ids.eos for r in rows_of(batch))

    def test_encoded_once(self):
        pairs = cases.some_pairs()
        kept = encode_pairs(pairs, FORM)
        for options in ({"seed": 3, "obs_dropout": 0.5}, {}):
            a, b, c = (collate(p, FORM, **options) for p in (pairs, kept, [*kept[:2], *pairs[2:]]))
            for name in a:
                assert torch.equal(a[name], b[name]) and torch.equal(a[name], c[name])
        assert all(isinstance(k, EncodedPair) for k in kept)
        assert encode_pairs([], FORM) == []

    def test_classes_are_those_of_the_op(self):
        special = FORM.ids
        for options in ({}, {"padding_side": "left"}, {"obs_dropout": 1.0}):
            batch = collate(cases.some_pairs(), FORM, **options)
            found = trace_token_class(
                *(batch[n] for n in ("ids", "mask", "asst_start", "answer_start")), *special[:4]
            )
            assert torch.equal(batch["cls"], found)
            assert torch.equal(batch["weights"], lm_weight(found, batch["is_pos"], 1.0, 1.0, True))


class TestDropout:
    """Check 14."""

    def pairs(self, count, calls=1):
        steps = tuple(Step("t", "n", "i", f"seen {i}") for i in range(calls))
        return [cases.pair(f"p{i}", trace=Trace(steps, None, "r")) for i in range(count)]

    def observations(self, batch):
        return [s.observation for r in rows_of(batch) for s in FORM.parse(r[0])[1].steps]

    def test_all_and_none(self):
        pairs = self.pairs(3, 2)
        assert set(self.observations(collate(pairs, FORM, obs_dropout=1.0))) == {FAILURE}
        assert set(self.observations(collate(pairs, FORM, obs_dropout=0.0))) == {"seen 0", "seen 1"}

    def test_share(self):
        """p = .01 on 10^4 observations: 100 expected, standard deviation 9.95; p = .5 to within four of its own."""
        pair = self.pairs(2500, 2)
        for share, low, high in ((0.01, 60, 140), (0.5, 4800, 5200)):
            count = sum(len(dropped(p, side, share, 7, 0)) for p in pair for side in (0, 1))
            assert low <= count <= high, count

    def test_each_on_its_own(self):
        pairs = self.pairs(400, 2)
        found = [(0 in d, 1 in d) for p in pairs for d in [dropped(p, 0, 0.5, 1, 0)]]
        assert all(60 <= found.count((a, b)) <= 140 for a in (True, False) for b in (True, False))
        sides = [(dropped(p, 0, 0.5, 1, 0), dropped(p, 1, 0.5, 1, 0)) for p in pairs]
        assert 50 < sum(a == b for a, b in sides) < 150

    def test_same_seed_same_choice(self):
        pairs = self.pairs(40, 2)
        draw = lambda **o: self.observations(collate(pairs, FORM, obs_dropout=0.5, **o))  # noqa: E731
        first = draw(seed=1, step=3)
        assert draw(seed=1, step=3) == first != draw(seed=2, step=3)
        assert draw(seed=1, step=4) != first
        # Whatever batch a pair is in, and wherever in it.
        alone = [
            self.observations(collate([p], FORM, obs_dropout=0.5, seed=1, step=3)) for p in pairs
        ]
        assert [a[:2] for a in alone] == [first[2 * i : 2 * i + 2] for i in range(40)]

    def test_nothing_else_changes(self):
        pairs = cases.some_pairs()
        whole, gone = (collate(pairs, FORM, obs_dropout=p) for p in (0.0, 1.0))
        for a, b in zip(rows_of(whole), rows_of(gone)):
            (query, trace), (query_b, trace_b) = FORM.parse(a[0]), FORM.parse(b[0])
            assert query == query_b
            hidden = tuple(dataclasses.replace(s, observation=FAILURE) for s in trace.steps)
            assert trace_b == dataclasses.replace(trace, steps=hidden)
            keep = lambda r: [(i, c) for i, c in zip(r[0], r[1]) if c != OBSERVATION]  # noqa: E731
            assert keep(a) == keep(b)
        assert torch.equal(whole["is_pos"], gone["is_pos"])

    def test_what_has_not_come_is_not_replaced(self):
        trace = Trace((Step("t", "n", "i", "seen"), Step("t", "n", "i")))
        assert dropped(cases.pair(trace=trace), 0, 1.0, 0, 0) == (0,)
        batch = collate([cases.pair(trace=trace)], FORM, obs_dropout=1.0)
        assert self.observations(batch) == [FAILURE, None] * 2

    def test_replaced_rows_fit_too(self):
        form = TraceFormat(byte_tokenizer(), max_length=220)
        trace = Trace((Step("t", "n", "i", "o"),), None, "r")
        batch = collate([cases.pair(context="c" * 300, trace=trace)], form, obs_dropout=1.0)
        assert batch["mask"].sum(1).tolist() == [220, 220]


class TestBadInput:
    def test_settings(self):
        pairs = [cases.pair()]
        for options, error in [
            ({"padding_side": "middle"}, "padding_side must be one of right, left, got 'middle'"),
            ({"inputs": "x"}, "inputs must be one of trace, plain, got 'x'"),
            ({"obs_dropout": 1.5}, r"obs_dropout must be in \[0, 1\], got 1.5"),
            ({"obs_dropout": -0.1}, r"obs_dropout must be in \[0, 1\], got -0.1"),
            ({"beta": -1.0}, "beta must be >= 0, got -1.0"),
            ({"omega": float("nan")}, "omega must be >= 0, got nan"),
            ({"multiple_of": 0}, "multiple_of must be >= 1, got 0"),
        ]:
            with pytest.raises(ValueError, match=error):
                collate(pairs, FORM, **options)
        with pytest.raises(ValueError, match="pairs is empty"):
            collate([], FORM)

    def test_the_pair_is_named(self):
        good, bad = cases.pair("good"), cases.pair("evil", bad="It is <start_work> 5.")
        with pytest.raises(
            ValueError,
            match="pair 'evil': answer holds the special token '<start_work>' at character 6",
        ):
            collate([good, bad], FORM)
        long = cases.pair("long", good="x" * 600)
        with pytest.raises(ValueError, match=r"pair 'long': a row needs .* and max_length is 512"):
            collate([good, long], TraceFormat(byte_tokenizer()))
        assert collate([good, bad], TraceFormat(byte_tokenizer(), escape=True))["ids"].shape[0] == 4

    def test_skip(self):
        pairs = [
            cases.pair("a"),
            cases.pair("evil", bad="<start_work>"),
            cases.pair("b"),
            cases.pair("long", good="x" * 600),
        ]
        form = TraceFormat(byte_tokenizer())
        with pytest.warns(
            UserWarning,
            match="2 of 4 pairs are left out, the first because of pair 'evil': answer holds",
        ):
            kept = encode_pairs(pairs, form, on_bad="skip")
        assert [k.pair.id for k in kept] == ["a", "b"]
        assert len(encode_pairs(pairs[:1], form, on_bad="skip")) == 1
        with pytest.raises(ValueError, match="on_bad must be one of raise, skip, got 'x'"):
            encode_pairs(pairs, form, on_bad="x")

    def test_rows_that_are_the_same(self):
        same = cases.pair("twin", bad="It is 4.")
        with pytest.raises(
            ValueError, match="pair 'twin': the rows of its two answers are the same"
        ):
            collate([same], FORM)
        other = cases.pair(
            "twin", bad="It is 4.", other=Trace((cases.STEP,), None, "The tool does not agree.")
        )
        collate([other], FORM)  # told apart by their traces
        with pytest.raises(
            ValueError, match="pair 'twin': the rows of its two answers are the same"
        ):
            collate([other], FORM, inputs="plain")

    def test_pad_that_is_eos(self):
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = None
        form = TraceFormat(tokenizer, max_length=None)
        batch = collate(cases.some_pairs(), form)
        assert form.ids.pad == form.ids.eos and rows_of(batch) == rows_of(
            collate(cases.some_pairs(), FORM)
        )
        assert (batch["cls"] == EOS).sum(1).tolist() == [1] * 10


def test_a_question_may_say_anything():
    pair = cases.pair(question="Answer: it is 4\nAnswer: It is 5.")
    query = FORM.parse(rows_of(collate([pair], FORM))[0][0])[0]
    assert query == Query(pair.question, pair.chosen.answer)
