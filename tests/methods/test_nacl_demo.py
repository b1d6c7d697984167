# SPDX-License-Identifier: Apache-2.0
"""``tenfold demo nacl``: one prefill for many rules, its line and tables, and the comparison of an eviction."""

import copy

import pytest
import torch
from demo_cases import FAST, check_protocol, rendered
from test_nacl_acceptance import prompt, tiny

from tenfold.data import Document
from tenfold.nacl import demo, eval_cases, speed
from tenfold.nacl.baselines import FullPress, StreamingLLMPress
from tenfold.nacl.eval import Case, Cell, retrieval_case, summary
from tenfold.nacl.press import NaclPress, Prefill
from tenfold.rlhf.small import ByteTokenizer, make_policy

LENGTH = 600


@pytest.fixture(scope="module")
def prefill():
    return Prefill.run(tiny(), prompt(1, LENGTH), proxies=32)


class TestOnePrefill:
    @pytest.mark.parametrize("make", [FullPress, NaclPress, StreamingLLMPress])
    def test_it_generates_what_a_run_of_its_own_does(self, make, prefill):
        model, ids = tiny(), prompt(1, LENGTH)
        change = {} if make is FullPress else {"compression_ratio": 0.8}
        want = speed.measure_generation(model, make(**change), ids, new_tokens=8)
        found = speed.measure_prefilled(model, make(**change), prefill, 1.5, new_tokens=8)
        assert found.tokens == want.tokens
        assert (found.prompt_tokens, found.kept_tokens) == (want.prompt_tokens, want.kept_tokens)
        assert found.cache_bytes == want.cache_bytes
        assert found.prefill_s == 1.5 + found.evict_s and (found.evict_s > 0) == (
            make is not FullPress
        )
        assert found.decode_ms > 0

    def test_it_keeps_the_last_queries(self, prefill):
        whole = Prefill.run(tiny(), prompt(1, LENGTH))
        for layer, queries in prefill.queries.items():
            assert queries.shape[2] == 32
            torch.testing.assert_close(queries, whole.queries[layer][:, :, -32:])
        few = Prefill.run(tiny(), prompt(1, 20), proxies=32)
        assert few.queries[0].shape[2] == 20

    def test_what_it_refuses(self, prefill):
        with pytest.raises(ValueError, match=r"proxies must be >= 1 or None .*, got 0"):
            Prefill.run(tiny(), prompt(1, LENGTH), proxies=0)
        press = NaclPress(compression_ratio=0.8, max_proxy=33)
        with pytest.raises(
            ValueError, match=r"the last 33 tokens, .* kept those of 32.*proxies=33"
        ):
            press.evict_prefilled(tiny(), prefill)


def test_an_eviction_in_pytorch_keeps_the_same(prefill):
    found = demo.eviction(prefill)
    assert (found.tokens, found.kept) == (LENGTH, 120)
    assert found.gap < 1e-5 and found.same > 0.9
    assert found.speed.op == "nacl_evict" and found.speed.ratio > 0


def test_an_eviction_that_keeps_others_shows(prefill, monkeypatch):
    plain = demo.plain_evict

    def worse(q, k, v, plan, pool):
        k, v, idx, scores = plain(q, k, v, plan, pool)
        idx[:] = torch.arange(idx.shape[-1])  # the first ones, whatever their scores
        return k, v, idx, scores

    monkeypatch.setattr(demo, "plain_evict", worse)
    found = demo.eviction(prefill)
    assert found.same < 0.6 and found.gap > 1e-3


def test_a_prompt_that_is_left_alone_has_no_eviction():
    with pytest.raises(ValueError, match="a prompt of 100 tokens alone"):
        demo.eviction(Prefill.run(tiny(), prompt(1, 100)))


@pytest.fixture(scope="module")
def found():
    """Two documents, four depths, numbers made up."""

    def case(length, depth, seed):
        return Case(
            "needle",
            length,
            depth,
            seed,
            tuple(range(65, 65 + length)),
            (1, 2),
            "48213",
            f"book {seed}",
        )

    def took(kept, size, evict):
        return speed.Speed(20, kept, 2.0 + evict, evict, 5.0 * size / 1000, size, size, [1, 2])

    stories = []
    for seed, said in ((1, "48213."), (2, "no idea")):
        speeds = {"full cache": took(20, 1000, 0.0), "NACL": took(4, 210, 0.01),
                  "StreamingLLM": took(4, 200, 0.005)}  # fmt: skip
        answers = {"full cache": "48213", "NACL": said, "StreamingLLM": "dark"}
        kept = {layer: torch.tensor([[[0, 3, 18, 19], [0, 7, 18, 19]]]) for layer in (0, 1)}
        stories.append(
            demo.Story(
                case(20, 0.35, seed), speeds, answers, kept, [chr(65 + i) for i in range(20)]
            )
        )
    cells = [Cell("needle", m, 1.0 if m == "full" else demo.KEPT, 10, d, 1, m in ("full", "nacl"), -0.25, "", 3.0, 2,
                  500, "book") for m in demo.METHODS for d in demo.DEPTHS]  # fmt: skip
    timed = demo.Eviction(FAST, 20, 4, 0.9987, 2.5e-7)
    return demo.Demo(stories, cells, timed, "Some-Model", "a setting", summary(cells))


def test_line_tables_and_page(found):
    line, text = check_protocol(demo, found)
    assert line.ran == "Some-Model, documents of 20 and 20 tokens"
    assert line.result == "1 of 2 answered right with 21 % of the cache (StreamingLLM: 0)"
    assert line.speed == FAST
    for words in ("book 1: the right answer is 48213", "no idea", "One fact in 10 tokens, 4 depths", "99.87 %",
                  "an_op", "a loop", "12.3×", "2.5e-07"):  # fmt: skip
        assert words in text
    page = rendered(demo, found)
    assert "12.3×" in page and "99.87 %" in page and page.count("data:image/png;base64") == 2

    other = copy.deepcopy(found)
    other.stories[1].answers |= {"NACL": "it is 48213", "StreamingLLM": "48213"}
    other.stories[0].speeds["NACL"].cache_bytes = 300
    assert (
        demo.headline(other).result
        == "2 of 2 answered right with 30 % of the cache (StreamingLLM: 1)"
    )
    assert other.to_json()["eviction"]["gap"] == 2.5e-7


def test_a_run(monkeypatch):
    """From a model to a line; another seed has other documents."""
    texts = tuple(Document(f"book {i}", "docs", f"page {i} of them all. " * 90) for i in range(9))
    monkeypatch.setattr(eval_cases, "_documents", lambda: texts)
    for name, value in {"LENGTHS": (700, 600), "SHORT": 500, "DEPTHS": (0.5,)}.items():
        monkeypatch.setattr(demo, name, value)
    model, told = (make_policy(0, layers=2, heads=2), ByteTokenizer()), []
    made = demo.run_demo(told.append, 1, model)
    assert len(told) <= demo.STEPS
    line, _ = check_protocol(demo, made)
    assert line.ran == "LlamaForCausalLM, documents of 700 and 600 tokens"
    assert [s.speeds["NACL"].kept_tokens for s in made.stories] == [140, 120]
    assert (made.eviction.tokens, made.eviction.kept) == (700, 140)
    assert made.eviction.gap < 1e-5
    drawn = [s.case.prompt for s in made.stories]
    for seed in (0, 1):
        cases = [
            retrieval_case(model[1], n, d, s + 100 * seed)
            for n, s, d in ((700, 11, 0.35), (600, 12, 0.8))
        ]
        assert ([c.prompt for c in cases] == drawn) == (seed == 1)


def test_no_pair():
    with pytest.raises(
        TypeError, match=r"model must be a tuple \(model, tokenizer\) or None, got ByteTokenizer"
    ):
        demo.run_demo(model=ByteTokenizer())
