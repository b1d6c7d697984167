# SPDX-License-Identifier: Apache-2.0
"""An evicted cache: cropped, reordered, re-rotated, evicted again; and what is refused.

Sections 3.5 to 3.7 of the specification beyond test_nacl_press.py.
"""

import pytest
import torch
from tiny_models import (
    LAYERS,
    assert_keys_are_those_of_kept_tokens,
    feed,
    make,
    masked_reference,
    padded,
    prompt,
    run,
)
from transformers import DynamicCache

from tenfold import nacl
from tenfold.integrations import transformers as hf
from tenfold.nacl.press import Prefill


class TestEditing:
    """Operations of transformers caches on an evicted one."""

    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    @pytest.mark.parametrize("lengths", [(300, 300), (340, 290)], ids=["even", "padded"])
    @pytest.mark.parametrize("absolute", [False, True])
    def test_crop(self, lengths, head_budget, absolute):
        """Tokens taken back leave no trace: as if they had never been."""
        model, rows = make(), [prompt(1, n, seed=n) for n in lengths]
        ids, mask = padded(rows)
        press = nacl.NaclPress(compression_ratio=0.8, head_budget=head_budget)
        wrong, more = prompt(2, 3, seed=3), prompt(2, 5, seed=2)
        want, _ = run(model, press, ids, more, mask)
        cache, width = press.new_cache(model), ids.shape[1]
        ones = torch.ones(2, 8, dtype=torch.long)
        with torch.no_grad(), press(model):
            feed(model, cache, ids, mask)
            feed(model, cache, more[:, :1], torch.cat([mask, ones[:, :1]], 1))
            feed(model, cache, wrong, torch.cat([mask, ones[:, :4]], 1))
            assert cache.get_seq_length() == width + 4
            cache.crop(width + 1 if absolute else -3)
            assert cache.get_seq_length() == width + 1
            got = feed(model, cache, more[:, 1:], torch.cat([mask, ones[:, :5]], 1))
        torch.testing.assert_close(got, want[:, 1:], atol=2e-4, rtol=1e-3)

    def test_crop_before_another_eviction(self):
        """The books of original positions stay right."""
        model, ids, more = make(), prompt(1, 300), prompt(1, 6, seed=2)
        press = nacl.NaclPress(keep_tokens=60, decode_interval=6)
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            feed(model, cache, ids)
            feed(model, cache, prompt(1, 4, seed=8), seen=300)
            cache.crop(-4)
            for i in range(6):
                feed(model, cache, more[:, i : i + 1], seen=300 + i)
        assert cache.layers[0].keys.shape[2] == 60 and press.stats.evictions == 2 * LAYERS
        assert_keys_are_those_of_kept_tokens(model, cache, press, torch.cat([ids, more], 1))

    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    def test_crop_into_the_evicted_prompt(self, head_budget):
        """Right as long as the newest tokens were all kept; refused where it would guess."""
        model, ids = make(), prompt(1, 300)
        press = nacl.NaclPress(keep_tokens=60, head_budget=head_budget)  # 3 recents
        for count, works in ((3, True), (200, False)):
            cache = press.new_cache(model)
            with torch.no_grad(), press(model):
                feed(model, cache, ids)
                if not works or head_budget == "adaptive":
                    with pytest.raises(RuntimeError, match=f"cannot remove {count} tokens.*evict"):
                        cache.crop(-count)
                    continue
                cache.crop(-count)
                got = feed(model, cache, prompt(1, 2, seed=4), seen=297)
            kept = {i: torch.where(k < 297, k, -1) for i, k in press.kept.items()}
            want = masked_reference(model, ids[:, :297], kept, prompt(1, 2, seed=4))
            torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)

    @pytest.mark.parametrize("settings", [{}, {"rerotate": True}, {"head_budget": "adaptive"}],
                             ids=str)  # fmt: skip
    @pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
    def test_rows_of_a_padded_batch(self, how, settings):
        """Rows swapped, dropped or doubled carry all that belongs to them."""
        model, rows = make(), [prompt(1, n, seed=n) for n in (340, 290)]
        ids, mask = padded(rows)
        press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.3, **settings)
        more = prompt(1, 4, seed=2).expand(2, -1)
        want, _ = run(model, press, ids, more, mask)
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            feed(model, cache, ids, mask)
            if how == "reorder":
                order = torch.tensor([1, 0])
                cache.reorder_cache(order)
            elif how == "select":
                order = torch.tensor([1])
                cache.batch_select_indices(order)
            else:
                order = torch.tensor([0, 0, 1, 1])
                cache.batch_repeat_interleave(2)
            mask, new = mask[order], more[:1].expand(len(order), -1)
            grown = torch.cat([mask, torch.ones(len(order), 4, dtype=torch.long)], 1)
            got = feed(model, cache, new, grown)
        torch.testing.assert_close(got, want[order], atol=2e-4, rtol=1e-3)

    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    def test_reset(self, head_budget):
        model, ids, more = make(), prompt(1, 300), prompt(1, 3, seed=2)
        press = nacl.NaclPress(compression_ratio=0.8, head_budget=head_budget)
        want, cache = run(model, press, ids, more)
        cache.reset()
        assert cache.get_seq_length() == 0 and not cache.evicted
        with torch.no_grad(), press(model):
            feed(model, cache, ids)
            got = feed(model, cache, more, seen=300)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class TestRerotation:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_batch_equals_single_runs(self, side):
        model, rows, more = make(), [prompt(1, n, seed=n) for n in (400, 290)], prompt(2, 4, seed=9)
        ids, mask = padded(rows, side)
        press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.3, rerotate=True)
        both, _ = run(model, press, ids, more, mask)
        for b, row in enumerate(rows):
            alone, _ = run(model, press, row, more[b : b + 1])
            torch.testing.assert_close(both[b : b + 1], alone, atol=2e-4, rtol=1e-3)

    def test_several_tokens_at_once_and_without_positions(self):
        """Positions go on from C whether the caller names true ones or none at all."""
        model, ids, more = make(), prompt(1, 300), prompt(1, 5, seed=2)
        press = nacl.NaclPress(compression_ratio=0.8, rerotate=True)
        want, _ = run(model, press, ids, more)
        for named in (True, False):
            cache = press.new_cache(model)
            with torch.no_grad(), press(model):
                hf.forward(model, ids, cache)
                got = (feed(model, cache, more, seen=300) if named
                       else hf.forward(model, more, cache).logits)  # fmt: skip
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    def test_again_and_again(self):
        """After each eviction the keys stand at 0..C-1: those of a fresh prompt of the kept tokens."""
        model, ids, more = make(), prompt(1, 300), prompt(1, 11, seed=2)
        press = nacl.NaclPress(keep_tokens=60, rerotate=True, decode_interval=5)
        _, cache = run(model, press, ids, more)
        assert press.stats.evictions == 3 * LAYERS and cache.layers[0].physical == 61
        tokens = torch.cat([ids, more], 1)[0]
        for head in range(2):
            kept = press.kept[0][0, head]
            fresh = torch.cat([tokens[kept], tokens[-1:]])[None]
            with torch.no_grad():
                full = hf.get_cache(dict(hf.forward(model, fresh, DynamicCache()))).layers[0].keys
            torch.testing.assert_close(cache.layers[0].keys[0, head], full[0, head], atol=1e-4,
                                       rtol=1e-4)  # fmt: skip

    def test_models_without_plain_rotary_are_refused(self):
        yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                "original_max_position_embeddings": 1024}  # fmt: skip
        for model in (make("StableLm"), make(rope_parameters=yarn)):
            press = nacl.NaclPress(compression_ratio=0.8, rerotate=True)
            with pytest.raises(TypeError, match="plain rotary"), press(model):
                model(prompt(1, 300), past_key_values=press.new_cache(model))


class TestRepeatedEviction:
    @pytest.mark.parametrize("interval", [1, 4])
    @pytest.mark.parametrize("lengths", [(300, 300), (340, 290)], ids=["even", "padded"])
    @pytest.mark.parametrize("budget", [{"keep_tokens": 60}, {"compression_ratio": 0.8}], ids=str)
    def test_decode_interval(self, interval, lengths, budget):
        """Back to C every m tokens; 1 is the paper's literal reading. ``kept`` are true positions."""
        model, rows, more = make(), [prompt(1, n, seed=n) for n in lengths], prompt(2, 9, seed=2)
        ids, mask = padded(rows)
        press = nacl.NaclPress(decode_interval=interval, **budget)
        _, cache = run(model, press, ids, more, mask)
        assert press.stats.evictions == LAYERS * (1 + 9 // interval)
        keeps = [press.plan(n).keep for n in lengths]
        assert cache.layers[2].keys.shape[2] == max(keeps) + 9 % interval
        assert (press.kept[2] >= 0).sum(-1).tolist() == [[keep] * 2 for keep in keeps]
        tokens = [torch.cat([row[0], more[b]]) for b, row in enumerate(rows)]
        starts = [ids.shape[1] - n for n in lengths]
        assert_keys_are_those_of_kept_tokens(model, cache, press, tokens, starts)
        assert int(press.kept[0].max()) == ids.shape[1] + 9 - 9 % interval - 1

    @pytest.mark.parametrize("budget", [{"keep_tokens": 60}, {"compression_ratio": 0.8}], ids=str)
    @pytest.mark.parametrize("rerotate", [False, True])
    def test_decode_interval_keeps_batch_rows_apart(self, budget, rerotate):
        model, rows, more = make(), [prompt(1, n, seed=n) for n in (340, 290)], prompt(2, 9, seed=2)
        ids, mask = padded(rows)
        press = nacl.NaclPress(decode_interval=4, random_ratio=0.2, rerotate=rerotate, **budget)
        both, _ = run(model, press, ids, more, mask)
        for b, row in enumerate(rows):
            alone, _ = run(model, press, row, more[b : b + 1])
            torch.testing.assert_close(both[b : b + 1], alone, atol=2e-4, rtol=1e-3)

    def test_evict_on_append(self):
        model, ids, turn = make(), prompt(2, 300), prompt(2, 50, seed=4)
        press = nacl.NaclPress(keep_tokens=60, evict_on_append=True)
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            feed(model, cache, ids)
            feed(model, cache, turn, seen=300)
        assert_keys_are_those_of_kept_tokens(model, cache, press, torch.cat([ids, turn], 1))
        kept = dict(press.kept)
        with torch.no_grad(), press(model):
            feed(model, cache, prompt(2, 1, seed=5), seen=350)
            assert not press.kept  # a single token is no turn
        assert cache.layers[3].keys.shape[2] == 61 and cache.get_seq_length() == 351
        assert int(kept[0].min()) == 0 and int(kept[0].max()) == 349

    @pytest.mark.parametrize("budget", [{"keep_tokens": 60}, {"compression_ratio": 0.8}], ids=str)
    def test_evict_on_append_of_a_padded_batch(self, budget):
        model, rows, turn = (
            make(),
            [prompt(1, n, seed=n) for n in (340, 290)],
            prompt(2, 40, seed=4),
        )
        ids, mask = padded(rows)
        press = nacl.NaclPress(evict_on_append=True, **budget)

        def last(ids, mask, turn):
            cache = press.new_cache(model)
            grown = torch.cat([mask, torch.ones_like(turn)], 1)
            one = torch.ones_like(mask[:, :1])
            with torch.no_grad(), press(model):
                feed(model, cache, ids, mask)
                feed(model, cache, turn, grown)
                return feed(model, cache, turn[:, :1], torch.cat([grown, one], 1))

        both = last(ids, mask, turn)
        for b, row in enumerate(rows):
            alone = last(row, torch.ones_like(row), turn[b : b + 1])
            torch.testing.assert_close(both[b : b + 1], alone, atol=2e-4, rtol=1e-3)

    def test_progressive(self):
        model, ids = make(), prompt(2, 900)
        press = nacl.NaclPress(keep_tokens=100, progressive=True, random_ratio=0.2)
        cache = press.new_cache(model)
        for i, chunk in enumerate(ids.split(300, 1)):
            with torch.no_grad(), press(model):
                feed(model, cache, chunk, seen=300 * i)
            assert_keys_are_those_of_kept_tokens(model, cache, press, ids[:, : 300 * (i + 1)])
            assert int(press.kept[0].max()) == 300 * (i + 1) - 1
        with torch.no_grad(), press(model):
            feed(model, cache, ids[:, :1], seen=900)
        assert cache.layers[0].keys.shape[2] == 101

    @pytest.mark.parametrize("last", [5, 40])
    @pytest.mark.parametrize("lengths", [(330, 330), (330, 280)], ids=["even", "left padded"])
    def test_chunked_with_a_last_chunk_shorter_than_the_proxies(self, lengths, last):
        """The rolling buffer has the queries of earlier chunks; ``finish`` evicts at once."""
        model, rows = make(), [prompt(1, n, seed=n) for n in lengths]
        ids, mask = padded(rows)
        whole = nacl.NaclPress(compression_ratio=0.8)
        parts = nacl.NaclPress(compression_ratio=0.8, chunked=True)
        with torch.no_grad():
            with whole(model):
                feed(model, whole.new_cache(model), ids, mask)
            cache, at = parts.new_cache(model), 0
            with parts(model):
                for size in (200, 130 - last, last):
                    feed(model, cache, ids[:, at : at + size], mask[:, : at + size])
                    at += size
                    assert not parts.kept
                parts.finish(cache)
                with pytest.raises(RuntimeError, match=r"evicted already.*evict_on_append=True"):
                    parts.finish(cache)
        assert all(torch.equal(parts.kept[i], whole.kept[i]) for i in range(LAYERS))
        assert cache.layers[0].keys.shape[2] == 66

    def test_what_is_refused(self):
        model, press = make(), nacl.NaclPress(compression_ratio=0.8)
        with pytest.raises(RuntimeError, match=r"inside `with press\(model\):`"):
            press.finish(press.new_cache(model))

    def test_padding_between_tokens(self):
        """A mask with holes, at once or through a padded turn, is refused, not misread."""
        model, ids = make(), prompt(2, 300)
        mask = torch.ones_like(ids)
        mask[1, 100:110] = 0
        press = nacl.NaclPress(keep_tokens=60, evict_on_append=True)
        with torch.no_grad(), press(model), pytest.raises(ValueError, match="unbroken run of ones"):
            feed(model, press.new_cache(model), ids, mask)
        mask = torch.ones(2, 340, dtype=torch.long)
        mask[1, 300:310] = 0
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            feed(model, cache, ids)
            with pytest.raises(ValueError, match="unbroken run of ones"):
                feed(model, cache, ids[:, :40], mask)

    def test_caches_that_are_not_ours_to_evict(self):
        model, ids = make(), prompt(1, 300)
        press = nacl.NaclPress(compression_ratio=0.8)
        used = DynamicCache(config=model.config)
        with torch.no_grad():
            feed(model, used, ids)
            with press(model), pytest.raises(TypeError, match=r"DynamicLayer with content.*: an "
                                             "empty DynamicCache or a NaclCache"):  # fmt: skip
                feed(model, used, ids[:, :5], seen=300)
            mine = press.new_cache(model)
            with press(model):
                feed(model, mine, ids)
            other = nacl.NaclPress(head_budget="adaptive")
            with other(model), pytest.raises(TypeError, match="same press settings"):
                feed(model, mine, ids[:, :5], seen=300)


def test_prefill_of_a_padded_batch_equals_running_the_press():
    """The shared prefill knows its mask."""
    model, rows = make(), [prompt(1, n, seed=n) for n in (340, 290)]
    ids, mask = padded(rows)
    press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.3)
    with torch.no_grad(), press(model):
        feed(model, press.new_cache(model), ids, mask)
    want = dict(press.kept)
    prefill = Prefill.run(model, ids, mask)
    press.evict_prefilled(model, prefill)
    for b, length in enumerate((340, 290)):
        assert int(press.kept[0][b].max()) == 339
        assert bool((press.kept[0][b][press.kept[0][b] >= 0] >= 340 - length).all())
    assert press.kept[0].shape == want[0].shape
