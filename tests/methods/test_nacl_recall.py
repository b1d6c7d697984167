# SPDX-License-Identifier: Apache-2.0
"""Check 12 of the specification: retrieval of a model trained on key-value recall (recall.py).

The prompt is ``k v`` 32 times and the asked key, 65 tokens; a fifth of it, 13 tokens, is kept; the
sign ``=`` after it is decoded over what was kept and has to give the value.

NACL runs with the package's default but for what is tuned for text. ``pool_kernel=1``: a fact is one
token here, and 13 kept tokens cannot hold a window of 15 around several peaks (the default finds
0.6 of the values). ``min_length=0``: the prompt is shorter than 256 tokens. The proxies are the last
6 tokens (10 % of the prompt; the default's cap of 32 does not bind). The thresholds are the
specification's; measured at seed 0: full 1.00, NACL 1.00, H2O 0.56, StreamingLLM 0.21, ten depths
of NACL 0.99 to 1.00 (paper's preset, random part included: 0.93, with ``re_logits="log_score"`` 0.99).
NACL is at 0.98 or above for seeds 1 to 4, too. What is missing is not the value: layer 0's two heads
without a pattern look at everything, so eviction changes what the sign ``=`` brings to layer 1.
"""

import pytest
import recall
import torch

from tenfold import nacl
from tenfold.nacl.press import Prefill

PROMPT, DEPTHS = 65, 10
SHARED = {"compression_ratio": 0.8, "min_length": 0}
RULES = {
    "full": nacl.FullPress(),
    "nacl": nacl.NaclPress(**SHARED, pool_kernel=1),
    "h2o": nacl.H2OPress(**SHARED),
    "streaming_llm": nacl.StreamingLLMPress(**SHARED),
}


@pytest.fixture(
    scope="module", params=[0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def trained(request):
    return recall.train(request.param), request.param


def accuracies(model, ids, answers) -> dict[str, torch.Tensor]:
    """Which answers each rule gets right, bool [prompts]; all evict the same prefill."""
    prefill, right = Prefill.run(model, ids[:, :PROMPT]), {}
    for name, press in RULES.items():
        cache = press.evict_prefilled(model, prefill)
        with torch.no_grad(), press(model):
            logits = model(ids[:, PROMPT:], past_key_values=cache).logits[:, -1]
        right[name] = logits.argmax(-1) == answers[:, 0]
    return right


def test_a_fifth_of_the_cache_answers_like_all_of_it(trained):
    model, seed = trained
    ids, answers, _ = recall.batch(torch.Generator().manual_seed(seed + 500), 1024)
    score = {n: float(x.float().mean()) for n, x in accuracies(model, ids, answers).items()}
    print(score)
    assert score["full"] >= 0.99
    assert score["nacl"] >= 0.95 * score["full"]
    assert score["streaming_llm"] < 0.5
    assert score["nacl"] >= score["h2o"]


def test_at_every_depth(trained):
    """The asked pair at ten places from the first to the last: the bars hold, and no place is lost.

    100 prompts a place scatter by 0.02, so a single place may be at 0.9 of the full cache, not below.
    """
    model, seed = trained
    generator = torch.Generator().manual_seed(seed + 600)
    places = [round(depth * (recall.KEYS - 1) / (DEPTHS - 1)) for depth in range(DEPTHS)]
    sets = [recall.batch(generator, 100, at=place) for place in places]
    ids, answers = (torch.cat([x[i] for x in sets]) for i in (0, 1))
    score = {
        name: right.float().view(DEPTHS, 100).mean(1)
        for name, right in accuracies(model, ids, answers).items()
    }
    print(score)
    assert bool((score["full"] >= 0.99).all())
    assert float(score["nacl"].mean()) >= 0.95 * float(score["full"].mean())
    assert bool((score["nacl"] >= 0.9 * score["full"]).all())
    # H2O finds what stands at the end (a recent) or the start, but is nowhere better
    assert bool((score["nacl"] >= score["h2o"] - 0.05).all())
    # sinks and recents hold the first two and the last pairs, and nothing of what lies between
    assert bool((score["streaming_llm"][1:-2] < 0.5).all())


def test_it_is_the_answer_that_is_kept(trained):
    """In the heads that look at the value, the value itself is among the kept tokens."""
    model, seed = trained
    ids, _, asked = recall.batch(torch.Generator().manual_seed(seed + 700), 200)
    press = RULES["nacl"]
    press.evict_prefilled(model, Prefill.run(model, ids[:, :PROMPT]))
    kept = press.kept[1][:, : recall.GUIDED]
    assert kept.shape[-1] == PROMPT // 5
    found = (kept == 2 * asked[:, :, None] + 1).any(-1)
    assert float(found.float().mean()) >= 0.95


def test_training_repeats_itself():
    """The same seed gives the same weights: the checks above are about eviction, not about luck."""
    first, second, other = (recall.train(seed, steps=3).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
