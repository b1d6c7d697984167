# SPDX-License-Identifier: Apache-2.0
"""Pre-training: the spec's bars on rendered words, mixtures, resumption, micro-batches, held-out losses."""

import os
import signal
from pathlib import Path

import pixelgpt_models as tiny
import pixelgpt_runs as runs
import pytest
import torch
from transformers import LlamaConfig

from tenfold.pixelgpt.config import PixelGPTConfig
from tenfold.pixelgpt.model import PixelGPTForCausalLM, make_model
from tenfold.pixelgpt.pretraining import pretrain
from tenfold.pixelgpt.record import PretrainRecord
from tenfold.pixelgpt.small import model_for, packaged_corpus
from tenfold.pixelgpt.steps import held_out_losses, target_counts
from tenfold.pixelgpt.streams import MixtureBatches
from tenfold.pixelgpt.train_config import PretrainConfig
from tenfold.testing import processes

HERE = Path(__file__).resolve().parent


def sanity_model(seed=0):
    assert issubclass(PixelGPTConfig, LlamaConfig)
    return make_model(
        PixelGPTConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=32, max_position_embeddings=64), seed,
    )  # fmt: skip


def strips(count, seed=0):
    image, counts = tiny.pillow_strips(count, seed)
    keep = torch.arange(48) < (counts + 1)[:, None]
    used = int(keep.sum(1).max())
    return {"pixel_values": image[..., : 16 * used], "patch_mask": keep[:, :used]}


def fit(model, data, steps, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randperm(len(data["patch_mask"]), generator=order)[:batch]
        model(**{k: v[at] for k, v in data.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def npp(model, data):
    return float(model(**data).pixel_loss)


def test_overfits_four_strips():
    """Check 12: below 0.02 within 200 steps."""
    model, data = sanity_model(), strips(4)
    start = npp(model, data)
    assert 0.8 < start < 1.1
    fit(model, data, 200, 4)
    assert npp(model, data) < 0.02


def test_learns_what_held_out_strips_look_like():
    """Check 12: 64 strips, 8 held out; below 0.65 at 200 steps, where a constant patch has about 0.7 and zero 0.93."""
    data = strips(72)
    train, held = ({k: v[s] for k, v in data.items()} for s in (slice(64), slice(64, 72)))
    model = sanity_model()
    fit(model, train, 200, 16)
    assert npp(model, held) < 0.65


def test_mixture_is_a_function_of_seed_and_step():
    streams, config = runs.streams("dualgpt"), runs.config("dualgpt", weights={"pair": 2.0})
    one, other = (MixtureBatches(streams, config) for _ in range(2))
    late = [one.take("pretrain", s, 4) for s in (7, 3, 0, 7)]
    early = [other.take("pretrain", s, 4) for s in range(8)]
    for a, s in zip(late, (7, 3, 0, 7)):
        assert all(torch.equal(a[k], early[s][k]) for k in a)
    drawn = [one.drawn(s)[0] for s in range(4000)]
    shares = [drawn.count(i) / 4000 for i in range(3)]
    assert one.names == ["text", "pixel", "pair"]
    for share, want in zip(shares, (0.25, 0.25, 0.5)):
        assert abs(share - want) < 0.03
    # Each stream's rows come around before any comes again.
    count = streams.count("pixel")
    steps = [s for s in range(4000) if drawn[s] == 1][:count]
    rows = [int(one.take("pretrain", s, 1)["input_ids"]) for s in steps]
    assert sorted(rows) == list(range(count))


@pytest.mark.parametrize("variant", ["textgpt", "pixelgpt", "monogpt", "dualgpt"])
def test_variants(variant):
    streams, config = runs.streams(variant), runs.config(variant)
    model = runs.model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    record = pretrain(model, streams, config, held_out=runs.streams(variant, held=True))
    changed = {
        n.split(".")[0 if "head" in n else 1]
        for n, p in model.named_parameters()
        if not torch.equal(p, before[n])
    }
    sides = {"textgpt": {"embed_tokens", "lm_head"}, "pixelgpt": {"embed_patches", "pixel_head"}}
    everything = sides["textgpt"] | sides["pixelgpt"]
    assert changed - {"layers", "norm"} == sides.get(variant, everything)
    assert all(p.requires_grad for p in model.parameters())
    assert (record.trained < record.parameters) == (variant in sides)
    first, last = record.validation[0], record.validation[-1]
    assert first["step"] == 0 and last["step"] == config.steps and len(record.validation) == 3
    for key in set(first) - {"step"}:
        assert last[key] < first[key], key
    assert set(first) - {"step"} == {
        "textgpt": {"text/ntp"}, "pixelgpt": {"pixel/npp"}, "monogpt": {"text/ntp", "pixel/npp"},
        "dualgpt": {"text/ntp", "pixel/npp", "pair/ntp", "pair/npp"},
    }[variant]  # fmt: skip
    assert set(record.baselines) == (set() if variant == "textgpt" else {"zero", "copy", "mean"})


def test_micro_batches_make_the_same_steps():
    models = []
    for size in (None, 3):
        model = runs.model()
        record = pretrain(
            model, runs.streams("dualgpt"), runs.config("dualgpt", micro_batch_size=size)
        )
        models.append((model, [m["loss"] for m in record.curve]))
    (a, x), (b, y) = models
    torch.testing.assert_close(torch.tensor(x), torch.tensor(y), atol=1e-4, rtol=1e-4)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=2e-2)


def test_killed_and_resumed_run_is_the_same(tmp_path):
    whole = runs.model()
    record = pretrain(whole, runs.streams("dualgpt"), runs.config("dualgpt", checkpoint_every=2))
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = processes.python(HERE / "pixelgpt_ranks.py", tmp_path, 5, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert list((tmp_path / "training").glob("pretrain-4"))
    model = runs.model()
    again = pretrain(
        model, runs.streams("dualgpt"), runs.config("dualgpt", checkpoint_every=2), out=tmp_path
    )
    assert again.curve == record.curve
    for p, q in zip(model.parameters(), whole.parameters()):
        assert torch.equal(p, q)
    saved = PixelGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.pixel_head.weight, whole.pixel_head.weight)
    assert PretrainRecord.read(tmp_path / "pretrain.json").curve == record.curve
    with pytest.raises(ValueError, match="belongs to another run"):
        (tmp_path / "training" / "run.json").write_text('{"config": {"seed": 1}}')
        pretrain(runs.model(), runs.streams("dualgpt"), runs.config("dualgpt"), out=tmp_path)


def test_held_out_losses_are_means_over_targets():
    model, streams = runs.model(), runs.streams("dualgpt")
    whole = held_out_losses(model, streams, batch_size=64)
    parts = held_out_losses(model, streams, batch_size=3)
    for key in whole:
        assert abs(whole[key] - parts[key]) < 1e-4
    batch = streams.batch("pair", range(streams.count("pair")))
    with torch.no_grad():
        made = model(**batch)
    assert abs(float(made.pixel_loss) - whole["pair/npp"]) < 1e-4
    assert abs(float(made.token_loss) - whole["pair/ntp"]) < 1e-4
    counts = target_counts(batch)
    assert counts[0] == (batch["labels"][:, 1:] != -100).sum()
    assert counts[1] - target_counts(batch, eos_in_loss=False)[1] == len(batch["labels"])


def test_refused():
    streams = runs.streams("textgpt")
    with pytest.raises(ValueError, match="the stream 'pixel' of pixelgpt has no rows"):
        pretrain(runs.model(), streams, runs.config("pixelgpt"))
    with pytest.raises(ValueError, match="longer than the model's 64 positions"):
        pretrain(runs.model(), streams, runs.config("textgpt", length=65))
    for changes, text in (
        ({"variant": "gpt"}, "variant must be one of"), ({"weights": {"pair": 1.0}}, "a stream of pixelgpt"),
        ({"weights": {"pixel": 0.0}}, "nothing to train on"), ({"steps": 0}, "steps must be >= 1"),
        ({"betas": (0.9,)}, "betas"), ({"warmup": 2}, "warmup"), ({"learning_rate": 0}, "learning_rate"),
        ({"mixed_precision": "fp8"}, "mixed_precision"), ({"weights": {"pixel": -1.0}}, "weights"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            PretrainConfig(**({"variant": "pixelgpt"} | changes))


@pytest.mark.slow
def test_minutes_on_packaged_text_beat_the_mean_patch():
    corpus = packaged_corpus()
    config = PretrainConfig.from_preset("small", steps=800, length=48, learning_rate=2e-3, seed=0)
    streams, held = corpus.streams(config)
    record = pretrain(model_for(corpus), streams, config, held_out=held)
    assert record.validation[-1]["pixel/npp"] < 0.85 * record.baselines["mean"]
