# SPDX-License-Identifier: Apache-2.0
"""Rows that decode at their own pace: the cache from prompt to score, and that a row is its own affair."""

import pytest
import themis_models as tiny
import tiny_models
import torch
from themis_models import call, calls, query

from tenfold.themis.decoding import AttentionRows, SingleRows, make_rows
from tenfold.themis.loop import ToolLoop
from tenfold.themis.model import ThemisRewardModel
from tenfold.themis.traces import Query

FORMAT = tiny.format()


class TestCache:
    @pytest.mark.parametrize("pooling, attention", [("last", "sdpa"), ("mean", "eager")])
    def test_decoding_is_one_full_forward(self, pooling, attention):
        """Check 8, with two calls, a cut, rows of other lengths, and a shared prefix."""
        model = tiny.reward_model(pooling=pooling, layers=2)
        model.set_attn_implementation(attention)

        def script(kind, n, ids):
            if kind == "tool" and ids.count(FORMAT.ids.tool) == 1:
                return call("calculator", "1+0"), "work"  # which is cut
            return calls(2)(kind, n, ids)

        box = tiny.Box(calculator=lambda arguments: "so " * 9 + arguments)
        queries = [query(n, answer) for n in range(3) for answer in ("4", "five hundred")]
        made = ToolLoop(tiny.Steered(script, FORMAT, model), FORMAT, box, batch_size=5).judge(
            queries
        )
        assert isinstance(make_rows(model, 1), AttentionRows)
        for found in made:
            assert found.finish == "rationale" and len(found.calls) == 2
            with torch.no_grad():
                want = model.reward(torch.tensor([found.ids]))
            assert found.reward == pytest.approx(float(want), abs=1e-5)

    @pytest.mark.parametrize("kind", ["Llama", "Gemma3", "Mistral", "Cohere2", "Lfm2", "GPT2"])
    def test_rows_of_many_kinds(self, kind):
        """Logits and rewards of rows that grow unevenly, share, are cut and dropped, are those of full forwards."""
        if kind == "GPT2":
            from test_themis_model import gpt2

            lm = gpt2()
        else:
            lm = tiny_models.make(kind, **({"sliding_window": 7} if kind == "Mistral" else {}))
        model = ThemisRewardModel.from_model(lm, seed=1)
        a, b, c = (tiny_models.prompt(1, n, n)[0].tolist() for n in (20, 15, 17))
        rows = make_rows(model, 4)
        assert isinstance(rows, SingleRows if kind == "Lfm2" else AttentionRows)
        with torch.inference_mode():
            rows.feed([0], [a[:4]])
            rows.share(0, 3, 4)
            rows.feed([1, 2], [b[:9], c[:3]])
            rows.feed([2, 0, 1], [c[3:4], a[4:6], b[9:14]])
            rows.crop(1, 11)
            rows.feed([3], [a[4:]])
            rows.feed([1, 2, 0], [b[11:12], c[4:5], a[6:7]])  # a row is carried along
            rows.keep([2, 1, 0])
            logits = rows.feed([0, 1, 2], [c[5:], b[12:], a[7:]])
            for i, ids in enumerate((c, b, a)):
                assert rows.tokens[i] == ids and len(rows.rewards[i]) == len(ids)
                out = model(torch.tensor([ids]), logits_to_keep=1)
                torch.testing.assert_close(logits[i], out.logits[0, 0], atol=1e-5, rtol=1e-5)
                assert rows.rewards[i][-1] == pytest.approx(float(out.reward), abs=1e-5)

    def test_numbers_of_a_row_that_broke_stay_there(self):
        """An infinity in a row that was cut is not in what takes its place."""
        model = tiny.reward_model()
        rows = AttentionRows(model, 2)
        ids = tiny_models.prompt(1, 12)[0].tolist()
        with torch.inference_mode():
            rows.feed([0, 1], [ids, ids])
            rows.cache.layers[0].values[0, :, :12] = torch.inf
            rows.crop(0, 0)
            rows.feed([0, 1], [ids[:5], ids[:1]])
            want = float(model.reward(torch.tensor([ids[:5]])))
        assert rows.rewards[0][-1] == pytest.approx(want, abs=1e-5)

    def test_rows_grow(self):
        model = tiny.reward_model()
        rows = AttentionRows(model, 2, room=4)
        ids = tiny_models.prompt(1, 30)[0].tolist()
        with torch.inference_mode():
            for at in range(0, 30, 3):
                rows.feed([1], [ids[at : at + 3]])
            assert rows.rewards[1][-1] == pytest.approx(
                float(model.reward(torch.tensor([ids]))), abs=1e-5
            )

    def test_a_question_is_read_once(self):
        """Two answers to one question, and nothing is read twice on the way to the score."""
        long, box = "long " * 30, tiny.Box(calculator="2")
        answers = [
            Query(long, "4"),
            Query(long, "5"),
            Query(long, "4"),
            query(),
            Query(long, "66", "context"),
        ]

        def script(kind, n, ids):
            return calls(2 if "Answer: 4" in FORMAT.decode(ids) else 1)(kind, n, ids)

        for size in (5, 2):  # all begin together, or the third while the first is still there
            lm = tiny.Scripted(script, FORMAT)
            made = ToolLoop(lm, FORMAT, box, batch_size=size).judge(answers)
            heads = [FORMAT.prompt(q) for q in answers]
            first = next(i for i, (x, y) in enumerate(zip(heads[0], heads[1])) if x != y)
            assert first > 150 and made[0].ids == made[2].ids
            whole = sum(len(j.ids) for j in made)
            assert lm.read == whole - first - (len(heads[0]) - 1)
        model = tiny.reward_model()
        for size in (5, 2):
            for found in ToolLoop(
                tiny.Steered(calls(1), FORMAT, model), FORMAT, box, batch_size=size
            ).judge(answers):
                with torch.no_grad():
                    want = model.reward(torch.tensor([found.ids]))
                assert found.reward == pytest.approx(float(want), abs=1e-5)

    def test_stops_where_the_old_loop_reads_again(self):
        lm = tiny.Scripted(calls(2), FORMAT)
        made = ToolLoop(lm, FORMAT, tiny.Box(calculator="2")).judge([query()])[0]
        assert lm.read == len(made.ids)


class TestRowsAreTheirOwn:
    """Check 5 of the loop: a batch of 1 is a batch of 8."""

    @pytest.mark.parametrize("sampled", [False, True])
    def test_any_batch(self, sampled):
        model = tiny.reward_model(3, layers=2)
        options = {"max_new_tokens": 12} | (
            {"temperature": 0.9, "top_p": 0.9, "top_k": 40} if sampled else {}
        )
        queries = [query(n, "4" * (n + 1)) for n in range(8)]
        found = [
            ToolLoop(model, FORMAT, tiny.Box(calculator="2"), batch_size=size, **options).judge(
                queries, seed=5
            )
            for size in (1, 3, 8)
        ]
        alone = [
            ToolLoop(model, FORMAT, tiny.Box(), **options).judge([q], seed=5)[0] for q in queries
        ]
        for others in found:
            for a, b in zip(alone, others):
                assert a.ids == b.ids and a.finish == b.finish
                assert a.reward == pytest.approx(b.reward, abs=1e-5)
        other = ToolLoop(model, FORMAT, tiny.Box(), **options).judge(queries, seed=6)
        assert ([j.ids for j in other] != [j.ids for j in alone]) == sampled

    def test_scripts_in_any_batch(self):
        model = tiny.reward_model()

        def script(kind, n, ids):
            return calls(FORMAT.decode(ids).count("4") % 2)(kind, n, ids)

        box = tiny.Box(calculator=lambda arguments: arguments * 3)
        queries = [query(n, "4" * (n + 1)) for n in range(8)]
        steered = tiny.Steered(script, FORMAT, model)
        alone = [ToolLoop(steered, FORMAT, box).judge([q])[0] for q in queries]
        for a, b in zip(alone, ToolLoop(steered, FORMAT, box, batch_size=8).judge(queries)):
            assert a.ids == b.ids and a.reward == pytest.approx(b.reward, abs=1e-5)
