# SPDX-License-Identifier: Apache-2.0
"""NACL on the packaged pretrained model: what eviction costs, saves and keeps."""

import pytest
import torch

from tenfold.data import smollm2
from tenfold.nacl import FullPress, NaclPress
from tenfold.nacl.eval import method_specs, retrieval_case, retrieval_cases, run, summary
from tenfold.nacl.speed import measure_generation


@pytest.fixture(scope="module")
def loaded():
    return smollm2()


@pytest.mark.slow
def test_cost_and_savings_at_4k_tokens(loaded):
    """Prefill at most 5 % slower, decoding faster, a fifth of the bytes, held and resident."""
    model, tokenizer = loaded
    case = retrieval_case(tokenizer, 4096, 0.4, 0)
    prompt = torch.tensor([case.prompt])
    measure_generation(model, FullPress(), prompt[:, :300], 3)
    full = measure_generation(model, FullPress(), prompt, 16)
    ours = measure_generation(model, NaclPress(compression_ratio=0.8), prompt, 16)
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert ours.kept_tokens == int(0.2 * 4096)
    assert full.cache_bytes == 4096 * a_token and ours.cache_bytes == ours.kept_tokens * a_token
    assert ours.evict_share <= 0.05
    assert ours.decode_ms < full.decode_ms
    assert 0.9 * full.cache_bytes < full.resident_bytes < 1.2 * full.cache_bytes
    assert ours.resident_bytes < 0.3 * full.cache_bytes
    for speed in (full, ours):
        assert tokenizer.decode(speed.tokens).strip().startswith(case.answer_text)


# (seed, depths, budgets)
DEPTHS, BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9), (0.2, 0.5)
CASES = [
    (0, DEPTHS[::2], BUDGETS[:1]),
    *(pytest.param(s, DEPTHS, BUDGETS, marks=pytest.mark.slow) for s in (0, 1, 2)),
]


@pytest.mark.parametrize(("seed", "depths", "budgets"), CASES)
def test_retrieval_is_not_below_h2o_and_streaming_llm(loaded, seed, depths, budgets):
    cases = retrieval_cases(loaded[1], [1024], [seed], depths)
    specs = method_specs(["full", "nacl", "h2o", "streaming_llm"], budgets)
    score = {(r["method"], r["budget"]): r["accuracy"] for r in summary(run(*loaded, cases, specs))}
    assert score["full", 1.0] >= 0.8
    for budget in budgets:
        ours = score["nacl", budget]
        assert ours >= max(score["h2o", budget], score["streaming_llm", budget])
        assert ours >= score["full", 1.0] - 0.2
