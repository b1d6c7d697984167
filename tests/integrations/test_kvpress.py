# SPDX-License-Identifier: Apache-2.0
"""The kvpress presses against kvpress's own, against NaclPress, and inside kvpress's wrappers."""

import importlib.util
import subprocess
from types import SimpleNamespace

import pytest
import torch

from tenfold import ops
from tenfold.testing import processes

pytestmark = pytest.mark.host_kvpress
VOCAB, LENGTH = 97, 300
RATIOS = (0.2, 0.5, 0.8, 0.9)  # int(300 * (1 - 0.9)) is 29: kvpress's arithmetic, not ours
SETTINGS = [
    {},
    {"random_ratio": 0.6},
    {"random_ratio": 0.6, "re_logits": "log_score", "re_temperature": 0.5, "seed": 7},
    {"random_ratio": 0.3, "pool_kernel": 1, "causal": False, "reduce": "sum", "max_proxy": 64},
    {"random_ratio": 0.3, "pool": "avg", "reduce": "max", "sink_tokens": 0},
    {"random_ratio": 0.2, "protect": "proxies", "proxy_ratio": 0.05},
    {"proxy_span": (-40, -10)},
]


def python(code: str, *paths) -> subprocess.CompletedProcess:
    before = "".join(f"sys.path.insert(0, {str(p)!r}); " for p in paths)
    return processes.python("-c", f"import sys; {before}{code}", loaded=("torch",))


class TestWithoutKvpress:
    """These run in any environment."""

    def test_missing(self):
        done = python("sys.modules['kvpress'] = None; import tenfold.integrations.kvpress")
        said = done.stderr.strip().splitlines()[-1]
        assert said.startswith("ModuleNotFoundError: ")
        assert "kvpress >= 0.5" in said and "pip install 'kvpress>=0.5'" in said

    @pytest.mark.parametrize("version, refused", [("0.4.3", True), ("0.5.0", False)])
    def test_version(self, tmp_path, version, refused):
        (tmp_path / "kvpress.py").write_text("ScorerPress = object")
        meta = tmp_path / f"kvpress-{version}.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: kvpress\nVersion: {version}\n"
        )
        done = python("import tenfold.integrations.kvpress", tmp_path)
        assert (done.returncode != 0) == refused, done.stderr
        if refused:
            said = done.stderr.strip().splitlines()[-1]
            assert said.startswith("ImportError: ") and "found 0.4.3" in said
            assert "kvpress >= 0.5" in said and "pip install" in said

    def test_integrations_import_no_host(self):
        done = python("import tenfold.integrations; print('kvpress' in sys.modules)")
        assert done.stdout.strip() == "False", done.stderr


@pytest.fixture
def kvpress():
    if importlib.util.find_spec("kvpress") is None:
        pytest.skip("needs kvpress (make test-hosts)")
    import kvpress

    return kvpress


@pytest.fixture
def ours(kvpress):
    from tenfold.integrations import kvpress as module

    return module


def tiny(attention: str = "sdpa", kind: str = "llama"):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    model = cls(config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    )).eval()  # fmt: skip
    # Random attention is almost uniform; sharper queries make the kept set matter.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 8
    model.set_attn_implementation(attention)
    return model


def prompt(batch: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def prefill(model, ids) -> list[tuple]:
    """What kvpress hands to ``score`` in every layer: module, hidden, keys, values, attentions, kwargs."""
    from tenfold.integrations import transformers as hf

    calls = []

    def note(module, args, kwargs, output):
        layer = hf.get_cache(kwargs).layers[module.layer_idx]
        calls.append((module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in hf.attention_layers(model)]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return calls


def proxy_scores(call: tuple, num: int) -> torch.Tensor:
    """S of the spec: causal, mean over the group, the last ``num`` tokens as proxies."""
    from tenfold.integrations import transformers as hf

    module, hidden, keys, _, _, kwargs = call
    queries = hf.queries(module, hidden[:, -num:], kwargs, num)
    with torch.no_grad():
        return ops.proxy_scores(queries, keys, scale=module.scaling)[0]


def kept_by_nacl(model, ids, ratio: float, press=None, **settings) -> dict[int, torch.Tensor]:
    """Kept positions of NaclPress for kvpress's budget."""
    from tenfold import nacl
    from tenfold.nacl.press import Prefill

    keep = max(1, int(ids.shape[1] * (1 - ratio)))
    make = nacl.NaclPress if press is None else press
    press = make(keep_tokens=keep, min_length=0, **settings)
    press.evict_prefilled(model, Prefill.run(model, ids))
    return press.kept


def top(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """What ``ScorerPress`` keeps of these scores."""
    keep = max(1, int(scores.shape[-1] * (1 - ratio)))
    return scores.topk(keep, dim=-1).indices.sort(-1).values


def run(model, press, ids):
    """The cache after a prefill under ``press``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    return cache


class TestIdentities:
    """Section 9 of the method: proxy_scores is what these presses score with."""

    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    @pytest.mark.parametrize("window", [1, 8, 64])
    def test_snapkv(self, kvpress, kind, window):
        press = kvpress.SnapKVPress(0.5, window_size=window, kernel_size=1)
        for call in prefill(tiny(kind=kind), prompt()):
            want = press.score(*call)[..., :-window]
            got = proxy_scores(call, window)[..., :-window] / window
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)

    def test_observed_attention(self, kvpress):
        for call in prefill(tiny("eager"), prompt()):
            want = kvpress.ObservedAttentionPress(0.5).score(*call)
            got = proxy_scores(call, LENGTH) / torch.arange(LENGTH, 0, -1)
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_tova(self, kvpress, attention):
        for call in prefill(tiny(attention), prompt()):
            want = kvpress.TOVAPress(0.5).score(*call)[..., :-1]
            got = proxy_scores(call, 1).mean(1, keepdim=True)[..., :-1].expand_as(want)
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


class TestScore:
    @pytest.mark.parametrize("ratio", RATIOS)
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_top_of_the_scores_is_what_nacl_keeps(self, ours, settings, ratio):
        model, ids = tiny(), prompt()
        press = ours.NaclScorerPress(ratio, **settings)
        want = kept_by_nacl(model, ids, ratio, **settings)
        for layer, call in enumerate(prefill(model, ids)):
            scores = press.score(*call)
            assert scores.shape == call[2].shape[:3] and scores.dtype == torch.float32
            assert torch.equal(top(scores, ratio), want[layer])
            keys, values = press.compress(*call)
            at = want[layer][..., None].expand(-1, -1, -1, 16)
            assert torch.equal(keys, call[2].gather(2, at))
            assert torch.equal(values, call[3].gather(2, at))

    @pytest.mark.parametrize("length", [1, 2, 3, 9, 40])
    def test_short_prompts(self, ours, length):
        model, ids = tiny(), prompt(length=length)
        for ratio in (0.3, 0.9):
            press = ours.NaclScorerPress(ratio, random_ratio=0.4)
            for call in prefill(model, ids):
                kept = top(press.score(*call), ratio)
                assert kept.shape[-1] == press.compress(*call)[0].shape[2]
                assert bool((kept == length - 1).any(-1).all())

    def test_tiers_and_values(self, ours):
        """protected > PTE > RE > rest; the values of the last three are the head's pooled shares."""
        model, ids = tiny(), prompt()
        press = ours.NaclScorerPress(0.5, random_ratio=0.5, pool_kernel=1)
        call = prefill(model, ids)[1]
        scores = press.score(*call)
        shares = proxy_scores(call, 30) / 30
        sink, recent, topk, drawn = 7, 8, 60, 75
        best = scores.argsort(-1, descending=True)
        ends = torch.cat([torch.arange(sink), torch.arange(LENGTH - recent, LENGTH)])
        assert torch.equal(best[..., : sink + recent].sort(-1).values, ends.expand(3, 2, -1))
        inner = shares[..., sink : LENGTH - recent]
        ranked = inner.sort(-1, descending=True)
        got = scores.sort(-1, descending=True).values
        assert bool((got[..., sink + recent :].diff() < 0).all())
        torch.testing.assert_close(got[..., sink + recent :], ranked.values)
        at = sink + recent + topk
        assert torch.equal(best[..., sink + recent : at], ranked.indices[..., :topk] + sink)
        for group in (best[..., at : at + drawn], best[..., at + drawn :]):
            assert bool((shares.gather(-1, group).diff() <= 0).all())
        assert not torch.equal(
            best[..., at : at + drawn], ranked.indices[..., topk : topk + drawn] + sink
        )

    def test_draws(self, ours):
        """Independent over layers, heads and chunks; the same for the same seed and sequence."""
        model, ids = tiny(), prompt()
        for layer in model.model.layers:  # equal scores: only the draw decides
            layer.self_attn.q_proj.weight.data.zero_()

        def kept(seed, rows=slice(None), **at):
            press = ours.NaclScorerPress(
                0.5, random_ratio=0.9, re_logits="log_score", seed=seed, causal=False
            )
            calls = prefill(model, ids[rows])
            return torch.stack([top(press.score(*call), 0.5) for call in calls])

        first = kept(1)
        assert torch.equal(first, kept(1)) and not torch.equal(first, kept(2))
        assert torch.equal(first[:, 2:], kept(1, slice(2, 3)))
        heads = [tuple(first[layer, 0, head].tolist()) for layer in range(3) for head in range(2)]
        assert len(set(heads)) == 6

    def test_gradients_enabled_and_half_precision(self, ours):
        model, ids = tiny().to(torch.bfloat16), prompt()
        press = ours.NaclScorerPress(0.8, random_ratio=0.3)
        with press(model):
            out = model(ids, use_cache=True)
        layer = out.past_key_values.layers[2]
        assert layer.keys.shape == (3, 2, 59, 16) and layer.keys.dtype == torch.bfloat16

    def test_names_of_later_transformers(self, ours):
        """From 5.2x on the cache is called ``cache``, and there is no ``cache_position``."""
        from transformers import DynamicCache

        model, ids = tiny(), prompt(1)
        press = ours.NaclScorerPress(0.5)
        want = run(model, press, ids)
        for new in (0, 1):  # the prompt is compressed, a token after it is not
            for call in prefill(model, ids):
                module, hidden, keys, values, _, kwargs = call
                cache = DynamicCache()
                for layer in range(3):
                    cache.update(keys, values, layer)
                    if new:
                        cache.update(keys[:, :, :1], values[:, :, :1], layer)
                names = ("position_embeddings", "position_ids")
                kwargs = {name: kwargs[name] for name in names} | {
                    "cache": cache, "hidden_states": hidden[:, :1] if new else hidden
                }  # fmt: skip
                press.forward_hook(module, (), kwargs, (None, None))
                got = cache.layers[module.layer_idx].keys
                if new:
                    assert got.shape[2] == LENGTH + 1
                else:
                    assert torch.equal(got, want.layers[module.layer_idx].keys)


class TestErrors:
    def test_values(self, ours):
        for bad in ({"compression_ratio": 1.0}, {"compression_ratio": -0.1}, {"random_ratio": 2.0},
                    {"pool": "median"}, {"max_proxy": 0}, {"re_temperature": 0.0}):  # fmt: skip
            with pytest.raises(ValueError, match=next(iter(bad))):
                ours.NaclScorerPress(**bad)

    def test_budget_too_small_for_the_proxies(self, ours):
        call = prefill(tiny(), prompt())[0]
        press = ours.NaclScorerPress(0.95, protect="proxies", max_proxy=64)
        with pytest.raises(ValueError, match=r"n_recent=30.*length=300"):
            press.score(*call)

    def test_layers(self, ours):
        module, hidden, keys, values, _, kwargs = prefill(tiny(), prompt())[0]
        press = ours.NaclScorerPress(0.5)
        with pytest.raises(TypeError, match="position_embeddings"):
            press.score(module, hidden, keys, values, None, {})
        fused = SimpleNamespace(scaling=1.0, head_dim=16, layer_idx=0)
        with pytest.raises(TypeError, match="q_proj"):
            press.score(fused, hidden, keys, values, None, kwargs)

    def test_rules(self, ours):
        from tenfold import nacl

        for settings, instead in (
            ({"rerotate": True}, "KeyRerotationPress"),
            ({"decode_interval": 8}, "DecodingPress"),
            ({"head_budget": "adaptive"}, "AdaKVPress"),
            ({"keep_tokens": 50}, "compression_ratio"),
            ({"min_length": 1000}, "long prompts"),
            ({"chunked": True}, "tenfold press"),
        ):
            with pytest.raises(ValueError, match=instead):
                ours.RuleScorerPress(0.5, nacl.NaclPress(**settings))
        for rule in (nacl.FullPress(), nacl.NaclPress(preset="repo")):
            with pytest.raises(ValueError, match="compression_ratio"):
                ours.RuleScorerPress(0.5, rule)
        with pytest.raises(ValueError, match="compression_ratio"):
            ours.RuleScorerPress(1.5)


class TestRules:
    @pytest.mark.parametrize("name", ["streaming_llm", "h2o", "tova", "snapkv", "random", "nacl"])
    def test_any_rule_keeps_its_own_set(self, ours, name):
        from tenfold import nacl

        model, ids = tiny(), prompt()
        press = ours.RuleScorerPress(0.8, nacl.METHODS[name]())
        want = kept_by_nacl(model, ids, 0.8, nacl.METHODS[name])
        for layer, call in enumerate(prefill(model, ids)):
            assert torch.equal(top(press.score(*call), 0.8), want[layer])

    def test_presets(self, ours):
        from tenfold import nacl

        model, ids = tiny(), prompt()
        press = ours.RuleScorerPress(0.8, nacl.NaclPress(preset="paper_20"))
        want = kept_by_nacl(model, ids, 0.8, preset="paper_20")
        for layer, call in enumerate(prefill(model, ids)):
            assert torch.equal(top(press.score(*call), 0.8), want[layer])
        assert press.rule.config.keep_tokens is None

    def test_same_sets_as_kvpress(self, ours, kvpress):
        from tenfold import nacl

        pairs = [
            (kvpress.SnapKVPress(0.8, 32, 1), nacl.SnapKVPress(window_size=32, pool_kernel=1)),
            (kvpress.TOVAPress(0.8), nacl.TOVAPress()),
        ]
        for call in prefill(tiny(), prompt()):
            for theirs, rule in pairs:
                mine = ours.RuleScorerPress(0.8, rule)
                assert torch.equal(top(mine.score(*call), 0.8), top(theirs.score(*call), 0.8))


class TestGenerate:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_equals_decoding_over_what_nacl_keeps(self, ours, attention):
        from transformers import DynamicCache

        from tenfold import nacl
        from tenfold.integrations import transformers as hf
        from tenfold.nacl.press import Prefill

        model, ids = tiny(attention), prompt()
        how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
               "attention_mask": torch.ones_like(ids)}  # fmt: skip
        full = model.generate(ids, **how)
        with ours.NaclScorerPress(0.8, random_ratio=0.3)(model):
            got = model.generate(ids, **how)

        prompt_run = Prefill.run(model, ids)
        press = nacl.NaclPress(keep_tokens=59, random_ratio=0.3)
        cache = DynamicCache(config=model.config)
        for i, layer in enumerate(press.evict_prefilled(model, prompt_run).layers):
            cache.update(layer.keys, layer.values, i)
        tokens = [prompt_run.logits.argmax(-1, keepdim=True)]
        for i in range(11):
            at = torch.full((3, 1), LENGTH + i)
            with torch.no_grad():
                out = hf.forward(model, tokens[-1], cache, position_ids=at)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        assert torch.equal(got, torch.cat([ids, *tokens], 1))
        assert not torch.equal(got, full)
        for module in model.modules():
            assert not module._forward_hooks

    def test_ratio_zero_changes_nothing(self, ours):
        model, ids = tiny(), prompt()
        cache = run(model, ours.NaclScorerPress(0.0), ids)
        assert cache.layers[0].keys.shape[2] == LENGTH


class TestWrappers:
    def test_key_rerotation_is_our_rerotate(self, ours, kvpress):
        from tenfold import nacl
        from tenfold.nacl.press import Prefill

        model, ids = tiny(), prompt()
        cache = run(model, kvpress.KeyRerotationPress(ours.NaclScorerPress(0.8)), ids)
        press = nacl.NaclPress(keep_tokens=59, rerotate=True)
        want = press.evict_prefilled(model, Prefill.run(model, ids))
        for mine, theirs in zip(want.layers, cache.layers):
            torch.testing.assert_close(theirs.keys, mine.keys, atol=1e-5, rtol=1e-4)
            assert torch.equal(theirs.values, mine.values)

    @pytest.mark.parametrize("settings", [{}, {"random_ratio": 0.4}], ids=str)
    def test_adakv(self, ours, kvpress, settings):
        """Heads share the budget by attention; with the full safeguard it is NACL's own set."""
        model, ids = tiny(), prompt()
        want, uneven = kept_by_nacl(model, ids, 0.8, **settings), 0
        for safeguard in (0.2, 1.0):
            base = ours.NaclScorerPress(0.8, **settings)
            run(model, kvpress.AdaKVPress(base, alpha_safeguard=safeguard), ids)
            for layer, block in enumerate(model.model.layers):
                keep = torch.ones(3, 2, LENGTH, dtype=torch.bool)
                keep[block.self_attn.masked_key_indices] = False
                counts = keep.sum(-1)
                assert counts.sum(-1).tolist() == [2 * 59] * 3
                ends = torch.cat([torch.arange(2), torch.arange(LENGTH - 3, LENGTH)])
                assert bool(keep[..., ends].all())
                if safeguard == 1.0:
                    nacl_set = torch.zeros_like(keep).scatter(-1, want[layer], True)
                    assert torch.equal(keep, nacl_set)
                else:
                    uneven += int((counts[:, 0] != counts[:, 1]).sum())
        assert uneven > 0

    def test_adakv_generates(self, ours, kvpress):
        model, ids = tiny(), prompt(1)
        with kvpress.AdaKVPress(ours.NaclScorerPress(0.8))(model):
            out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert out.shape[1] > LENGTH

    def test_chunks_are_scored_at_their_own_positions(self, ours, kvpress):
        """In the first layer a chunk's kept set is that of the chunk as a prompt of its own."""
        model, ids = tiny(), prompt(length=256)
        cache = run(model, kvpress.ChunkPress(ours.NaclScorerPress(0.5), chunk_length=64), ids)
        assert all(layer.keys.shape[2] == 128 for layer in cache.layers)
        keys = prefill(model, ids)[0][2]
        for chunk in range(4):
            tokens = ids[:, 64 * chunk : 64 * (chunk + 1)]
            kept = kept_by_nacl(model, tokens, 0.5)[0] + 64 * chunk  # RoPE only knows distances
            want = keys[..., 0].gather(2, kept).sort(-1).values
            got = cache.layers[0].keys[:, :, 32 * chunk : 32 * (chunk + 1), 0].sort(-1).values
            assert torch.equal(got, want)

    def test_chunks_draw_apart(self, ours, kvpress):
        model, ids = tiny(), prompt(1, 64).repeat(1, 4)
        model.model.layers[0].self_attn.q_proj.weight.data.zero_()
        base = ours.NaclScorerPress(0.5, random_ratio=0.9, re_logits="log_score", causal=False)
        module, hidden, keys, values, _, kwargs = prefill(model, ids)[0]
        sets = set()
        for chunk in range(4):
            at = slice(64 * chunk, 64 * (chunk + 1))
            part = base.score(module, hidden[:, at], keys[:, :, at], values[:, :, at], None, kwargs)
            sets.add(tuple(top(part, 0.5)[0, 0].tolist()))
        assert len(sets) == 4

    @pytest.mark.parametrize("inside", [False, True], ids=["decoding", "prefill and decoding"])
    def test_decoding(self, ours, kvpress, inside):
        from transformers import DynamicCache

        model, ids = tiny(), prompt(2)
        base = ours.NaclScorerPress(0.0, random_ratio=0.3)
        press = kvpress.DecodingPress(base, compression_interval=10, target_size=60)
        if inside:
            press = kvpress.PrefillDecodingPress(ours.NaclScorerPress(0.8), press)
        cache = DynamicCache(config=model.config)
        with press(model):
            out = model.generate(ids, past_key_values=cache, max_new_tokens=31, do_sample=False,
                                 pad_token_id=0, eos_token_id=None)  # fmt: skip
        assert out.shape == (2, LENGTH + 31)
        assert [layer.keys.shape[2] for layer in cache.layers] == [60] * 3

    def test_buffered_queries_stand_where_their_tokens_stood(self, ours):
        """DecodingPress buffers inputs; only the newest token's embeddings come with them."""
        model, ids = tiny(), prompt(2)
        module, hidden, keys, values, _, kwargs = prefill(model, ids)[1]
        module.rotary_emb = model.model.rotary_emb  # as every kvpress context does
        cos, sin = kwargs["position_embeddings"]
        last = {
            "hidden_states": hidden[:, -1:].clone(),
            "position_embeddings": (cos[:, -1:], sin[:, -1:]),
            "position_ids": torch.full((2, 1), LENGTH - 1),
        }
        press = ours.NaclScorerPress(0.5, max_proxy=16)
        want = press.score(module, hidden, keys, values, None, kwargs)
        got = press.score(module, hidden[:, -16:].clone(), keys, values, None, last)
        torch.testing.assert_close(got, want)

    def test_the_others_run(self, ours, kvpress):
        model, ids = tiny(), prompt(1)
        base = ours.NaclScorerPress
        presses = [
            (kvpress.ChunkKVPress(base(0.5), chunk_length=20), 140),
            (kvpress.BlockPress(base(0.5), block_size=64), 150),
            (kvpress.CriticalKVPress(base(0.5)), 150),
            (kvpress.CriticalAdaKVPress(base(0.5)), LENGTH),
            (kvpress.ComposedPress([kvpress.KnormPress(0.5), base(0.5)]), 75),
            (kvpress.ComposedPress([base(0.5), base(0.5)]), 75),
        ]
        for press, size in presses:
            cache = run(model, press, ids)
            assert [layer.keys.shape[2] for layer in cache.layers] == [size] * 3, press
        per_layer = kvpress.PerLayerCompressionPress(base(), [0.2, 0.5, 0.8])
        sizes = [layer.keys.shape[2] for layer in run(model, per_layer, ids).layers]
        assert sizes == [240, 150, 59]
