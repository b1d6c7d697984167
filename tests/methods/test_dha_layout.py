# SPDX-License-Identifier: Apache-2.0
"""HeadLayout: checks of maps (section 7), sizes, structure, and permutations of query heads (check 6)."""

import pytest
import torch
from tiny_models import make, prompt

from tenfold.dha import HeadLayout, from_mha, permute_query_heads, sort_query_heads
from tenfold.dha.layout import Component

K2V3 = {
    "num_heads": 4, "key_heads": [2, 1], "value_heads": [3, 4],
    "key_head_map": [[0, 1, 1, 0], [0, 0, 0, 0]],
    "value_head_map": [[2, 1, 0, 2], [3, 2, 1, 0]],
}  # fmt: skip


def layout(**changes) -> HeadLayout:
    return HeadLayout(**(K2V3 | changes))


def random_layout(layers: int, heads: int, seed: int = 0) -> HeadLayout:
    """Head counts and maps at random, every head used."""
    gen = torch.Generator().manual_seed(seed)

    def maps():
        counts = torch.randint(1, heads + 1, (layers,), generator=gen).tolist()
        rows = [
            torch.cat([torch.arange(n), torch.randint(0, n, (heads - n,), generator=gen)])
            for n in counts
        ]
        return counts, [row[torch.randperm(heads, generator=gen)].tolist() for row in rows]

    (key_heads, kmap), (value_heads, vmap) = maps(), maps()
    return HeadLayout(heads, key_heads, value_heads, kmap, vmap)


BAD = {
    "entry too large": (
        {"key_head_map": [[0, 1, 2, 0], [0] * 4]},
        r"key_head_map must be in \[0, 2\) \(key_heads\), got 2 at layer 0, position 2",
    ),
    "negative entry": (
        {"value_head_map": [[2, 1, 0, 2], [3, 2, -1, 0]]},
        r"value_head_map must be in \[0, 4\) \(value_heads\), got -1 at layer 1, position 2",
    ),
    "short map": (
        {"key_head_map": [[0, 1, 1, 0], [0, 0, 0]]},
        r"key_head_map of layer 1 must have one entry per query head \(4\), got 3",
    ),
    "float entry": (
        {"key_head_map": [[0, 1.0, 1, 0], [0] * 4]},
        r"key_head_map must be integers, got 1\.0 at layer 0, position 1",
    ),
    "bool entry": (
        {"key_head_map": [[0, True, 1, 0], [0] * 4]},
        r"key_head_map must be integers, got True at layer 0, position 1",
    ),
    "float tensor": (
        {"key_head_map": [torch.zeros(4), [0] * 4]},
        r"key_head_map of layer 0 must be a 1-D int32 or int64 tensor or a list, got torch\.float32",
    ),
    "no list": ({"key_head_map": [3, [0] * 4]}, r"key_head_map of layer 0 must be a list .* got 3"),
    "count of no heads": (
        {"key_heads": [2, 0]}, r"key_heads must be in \[1, 4\], got 0 at layer 1",
    ),
    "more heads than queries": (
        {"value_heads": [5, 4]}, r"value_heads must be in \[1, 4\], got 5 at layer 0",
    ),
    "missing layer": (
        {"key_head_map": [[0, 1, 1, 0]]}, "key_head_map has 1 layers, key_heads has 2",
    ),
    "layers differ": (
        {"value_heads": [3], "value_head_map": [[2, 1, 0, 2]]},
        "key_heads has 2 layers, value_heads 1",
    ),
    "no query heads": ({"num_heads": 0}, "num_heads must be >= 1, got 0"),
}  # fmt: skip


class TestChecks:
    @pytest.mark.parametrize("case", BAD)
    def test_bad_input(self, case):
        changes, message = BAD[case]
        with pytest.raises(ValueError, match=message):
            layout(**changes)

    def test_tensors_and_unused_heads_are_fine(self):
        got = layout(key_head_map=[torch.tensor([0, 1, 1, 0]), torch.zeros(4, dtype=torch.int32)],
                     value_heads=[4, 4])  # fmt: skip
        assert got.key_head_map == ((0, 1, 1, 0), (0, 0, 0, 0))
        assert got == layout(value_heads=(4, 4)) and hash(got) == hash(layout(value_heads=(4, 4)))

    @pytest.mark.parametrize("kv_heads, message", [
        (3, "must divide the 8 query heads, got 3 at layer 0"),
        ([4, 0], "must divide the 8 query heads, got 0 at layer 1"),
    ])  # fmt: skip
    def test_gqa_that_does_not_divide(self, kv_heads, message):
        with pytest.raises(ValueError, match=message):
            HeadLayout.gqa(2, 8, kv_heads)


class TestMakers:
    def test_identity_and_gqa(self):
        mha = HeadLayout.identity(3, 4)
        assert mha.key_heads == mha.value_heads == (4, 4, 4)
        assert mha.key_head_map[2] == (0, 1, 2, 3) and mha.ratio == 1
        gqa = HeadLayout.gqa(2, 8, [4, 2])
        assert gqa.key_head_map == ((0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 0, 0, 1, 1, 1, 1))
        assert gqa.value_head_map == gqa.key_head_map and gqa.value_heads == (4, 2)

    def test_from_maps(self):
        got = HeadLayout.from_maps(K2V3["key_head_map"], K2V3["value_head_map"])
        assert got == layout()

    def test_from_config_and_back(self):
        model = make(num_attention_heads=4, num_key_value_heads=2)
        assert HeadLayout.from_config(model.config) == HeadLayout.gqa(4, 4, 2)
        fields = layout().config_fields()
        assert all(isinstance(value, list) for value in fields.values())
        config = type("Config", (), {"num_attention_heads": 4, **fields})
        assert HeadLayout.from_config(config) == layout()


class TestSizes:
    def test_heads_and_bytes(self):
        assert layout().total_heads == 2 + 1 + 3 + 4 and layout().ratio == 10 / 16
        assert layout().kv_bytes_per_token(64, 2) == 10 * 64 * 2
        assert layout().kv_bytes_per_token(64, 4, value_dim=32) == (3 * 64 + 7 * 32) * 4

    @pytest.mark.parametrize("share, kib", [(1, 512), (2, 256), (4, 128)])
    def test_llama2_7b(self, share, kib):
        """Section 2: 512, 256 and 128 KiB per token in bfloat16."""
        assert HeadLayout.gqa(32, 32, 32 // share).kv_bytes_per_token(128, 2) == kib * 1024


class TestStructure:
    def test_components(self):
        assert layout().components(0) == [
            Component((0, 3), (0,), (2,)),
            Component((1, 2), (1,), (0, 1)),
        ]
        assert layout().components(1) == [Component((0, 1, 2, 3), (0,), (0, 1, 2, 3))]
        assert layout().component_of_heads(0) == ([0, 1, 1, 0], [0, 1], [1, 1, 0])

    def test_a_chain_is_one_component(self):
        """Keys join 0-1 and 2-3, values 1-2: nothing can be evicted apart."""
        chain = HeadLayout(4, [2], [3], [[0, 0, 1, 1]], [[0, 1, 1, 2]])
        assert len(chain.components(0)) == 1

    def test_gqa_has_one_component_per_group(self):
        assert [c.query_heads for c in HeadLayout.gqa(1, 8, 4).components(0)] == [
            (0, 1), (2, 3), (4, 5), (6, 7),
        ]  # fmt: skip

    def test_unused_heads_go_with_the_first_component(self):
        got = HeadLayout(2, [2], [2], [[1, 1]], [[0, 1]]).components(0)
        assert got == [Component((0, 1), (0, 1), (0, 1))]

    @pytest.mark.parametrize("seed", range(8))
    def test_components_by_brute_force(self, seed):
        got = random_layout(1, 7, seed)
        kmap, vmap = got.key_head_map[0], got.value_head_map[0]
        linked = torch.eye(7, dtype=torch.bool)
        for a in range(7):
            for b in range(7):
                linked[a, b] |= kmap[a] == kmap[b] or vmap[a] == vmap[b]
        for _ in range(7):
            linked = (linked.float() @ linked.float()) > 0
        want = {tuple(row.nonzero().flatten().tolist()) for row in linked}
        parts = got.components(0)
        assert {c.query_heads for c in parts} == want
        for name, count in (("key_heads", got.key_heads), ("value_heads", got.value_heads)):
            heads = sorted(h for c in parts for h in getattr(c, name))
            assert heads == list(range(count[0]))  # each head in exactly one component

    @pytest.mark.parametrize("kmap, vmap, equal, nested", [
        ([0, 0, 1, 1], [1, 1, 0, 0], True, True),
        ([0, 0, 1, 1], [0, 1, 2, 3], False, True),
        ([0, 0, 0, 0], [0, 1, 0, 1], False, True),
        ([0, 0, 1, 1], [0, 1, 1, 0], False, False),
    ])  # fmt: skip
    def test_equal_and_nested(self, kmap, vmap, equal, nested):
        got = HeadLayout.from_maps([kmap], [vmap])
        assert got.is_equal(0) is equal and got.is_nested(0) is nested

    def test_sorted_and_gqa(self):
        assert HeadLayout.gqa(1, 4, 2).is_gqa(0) and HeadLayout.gqa(1, 4, 2).is_sorted(0)
        swapped = HeadLayout.from_maps([[0, 0, 1, 1]], [[1, 1, 0, 0]])
        assert swapped.is_sorted(0) and not swapped.is_gqa(0)
        assert not layout().is_sorted(0) and not layout().is_gqa(0)


class TestPermutation:
    def test_permuted(self):
        got = layout().permuted([[3, 2, 1, 0], [1, 0, 2, 3]])
        assert got.key_head_map == ((0, 1, 1, 0), (0, 0, 0, 0))
        assert got.value_head_map == ((2, 0, 1, 2), (2, 3, 1, 0))

    @pytest.mark.parametrize("order, message", [
        ([[0, 1, 2, 3]], "order has 1 layers, the model 2"),
        ([[0, 1, 2, 3], [0, 1, 2, 2]], r"order of layer 1 must be a permutation of 0\.\.3"),
    ])  # fmt: skip
    def test_bad_orders(self, order, message):
        with pytest.raises(ValueError, match=message):
            layout().permuted(order)

    @pytest.mark.parametrize("bias", [False, True])
    def test_permuting_query_heads_leaves_logits_unchanged(self, bias):
        """Check 6: rows of W_q, columns of W_o and map entries move together."""
        model = from_mha(make(attention_bias=bias), attn_implementation="sdpa")
        if bias:  # zero at the start: it would not tell
            for layer in model.model.layers:
                torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        ids = prompt(2, 30)
        with torch.no_grad():
            want = model(ids).logits
            order = [torch.randperm(4).tolist() for _ in range(4)]
            permute_query_heads(model, order)
            assert model.config.head_layout == HeadLayout.gqa(4, 4, 2).permuted(order)
            torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
            swapped = 1 - model.model.layers[1].self_attn.key_map
            model.model.layers[1].self_attn.set_maps(swapped, swapped)
            assert float((model(ids).logits - want).abs().max()) > 1e-3  # the maps matter

    def test_sorting(self):
        model = from_mha(make(), attn_implementation="sdpa")
        ids = prompt(2, 30)
        permute_query_heads(model, [[2, 0, 3, 1]] * 4)
        with torch.no_grad():
            want = model(ids).logits
            order = sort_query_heads(model)
            got = model.config.head_layout
            assert order == [[1, 3, 0, 2]] * 4 and got == HeadLayout.gqa(4, 4, 2)
            torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
        assert sort_query_heads(model) == [[0, 1, 2, 3]] * 4

    def test_only_dha_models_can_be_sorted(self):
        with pytest.raises(TypeError, match="LlamaForCausalLM has no key_head_map"):
            sort_query_heads(make())
