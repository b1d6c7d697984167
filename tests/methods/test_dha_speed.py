# SPDX-License-Identifier: Apache-2.0
"""A converted model's cache and its decoding time, end to end."""

import pytest
import torch

from tenfold.dha import speed


def test_bytes_are_those_of_the_shared_heads():
    for budget, heads in ((1.0, 8), (0.5, 4), (0.25, 2)):
        layout = speed.random_layout(2, 8, budget)
        model = speed.make_model(layout, hidden_size=64, intermediate_size=64, head_dim=8,
                                 num_attention_heads=8, num_hidden_layers=2)  # fmt: skip
        held = speed.cache_bytes(speed.filled_cache(model, 100))
        assert held == 2 * 2 * heads * 8 * 4 * 100 == 100 * layout.kv_bytes_per_token(8, 4)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_decoding_gets_faster_with_the_budget(dtype):
    # 16k tokens of 32 heads: the cache is most of what a step reads, so fewer heads must show. The
    # bound is far below what is lost to a busy machine: half and a quarter of the bytes.
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    rows = speed.measure([16384], dtype=dtype, tokens=7, **shape)
    assert [r["cache_bytes"] / rows[0]["cache_bytes"] for r in rows] == [1.0, 0.5, 0.25]
    assert rows[1]["speedup"] > 1.15 and rows[2]["speedup"] > 1.5, rows
