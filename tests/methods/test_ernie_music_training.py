# SPDX-License-Identifier: Apache-2.0
"""Training: it learns, it goes on exactly, ranks and micro-batches are one batch; judges and evaluation."""

import json
from pathlib import Path

import ernie_music_models as tiny
import numpy as np
import pytest
import torch
from ranks import MODES

from tenfold.ernie_music import ErnieMusicPipeline
from tenfold.ernie_music.evaluation import evaluate, metric_of, register_metric, train_judges
from tenfold.ernie_music.report import spectrogram_picture
from tenfold.ernie_music.spectral import band_energies, features, frechet_distance, statistics
from tenfold.ernie_music.train_config import MusicTrainConfig
from tenfold.ernie_music.training import held_out_loss, train
from tenfold.testing import processes
from tenfold.training.errors import TrainingError

HERE = Path(__file__).resolve().parent


def settings(**changes):
    return MusicTrainConfig.from_preset(
        "small",
        **(
            {
                "steps": 6,
                "batch_size": 4,
                "log_every": 3,
                "time_bins": 4,
                "checkpoint_every": 2,
                "learning_rate": 1e-3,
            }
            | changes
        ),
    )


def run(out=None, callback=None, **changes):
    made = tiny.unet(3)
    record, ema = train(
        made, tiny.pieces(), tiny.encoder(), settings(**changes), out=out, callback=callback
    )
    return record, made, ema


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


class Stop(Exception):
    pass


def test_15_a_killed_run_goes_on_exactly(tmp_path):
    whole, last, ema = run(tmp_path / "whole")

    def kill(p):
        if p.step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "part", kill)
    part, again, averaged = run(tmp_path / "part")
    assert part.curve == whole.curve and same(last, again) and same(ema, averaged)
    assert not same(last, ema) and len(whole.curve) == 6
    assert [e["step"] for e in whole.by_time()] == [3, 6]
    assert not list((tmp_path / "part" / "training").glob("*"))
    pipe = ErnieMusicPipeline.from_pretrained(tmp_path / "part")
    assert same(pipe.unet, ema) and pipe.unet.config.condition_dropout == 0.1
    saved = json.loads((tmp_path / "part" / "train.json").read_text())
    assert saved["rows"] == 12 and saved["trained"] == saved["parameters"]
    with pytest.raises(ValueError, match="belongs to another run"):
        with pytest.raises(Stop):
            run(tmp_path / "part", kill)
        run(tmp_path / "part", seed=9)


def test_micro_batches_are_one_batch():
    whole, one, _ = run(steps=3)
    parts, two, _ = run(steps=3, micro_batch_size=2)
    assert [m["loss"] for m in whole.curve] == pytest.approx(
        [m["loss"] for m in parts.curve], rel=1e-4
    )
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_one_of_them_killed_on_the_way_train_what_one_trains(tmp_path, mode):
    script = HERE / "ernie_music_ranks.py"
    killed = processes.ranks(script, tmp_path, "2", env=MODES[mode])
    assert killed.returncode and "killed" in killed.stdout, killed.stderr[-4000:]
    assert list((tmp_path / "out" / "training").glob("*-2")) and not list(
        tmp_path.glob("out/*.json")
    )
    done = processes.ranks(script, tmp_path, env=MODES[mode])
    assert done.returncode == 0, done.stderr[-4000:]
    record, _, ema = run(steps=3)
    found = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [m["loss"] for m in found["curve"]] == pytest.approx(
        [m["loss"] for m in record.curve], rel=1e-4
    )
    theirs = ErnieMusicPipeline.from_pretrained(tmp_path / "out").unet
    for a, b in zip(theirs.parameters(), ema.parameters()):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)


def test_it_learns_and_writes_demos(tmp_path):
    made, data = tiny.unet(3), tiny.pieces()
    before = held_out_loss(made, data, tiny.encoder(), bins=4, rows=16)
    record, ema = train(
        made,
        data,
        tiny.encoder(),
        settings(
            steps=60,
            learning_rate=2e-3,
            demo_every=30,
            demo_steps=2,
            ema_early_epochs=100,
            log_every=20,
        ),
        held_out=data,
        out=tmp_path,
        demo_prompts=["low", "high"],
    )
    after = record.validation[-1]
    assert after["loss"] < 0.7 * before["loss"] and set(before) == {
        "loss",
        "time/0",
        "time/1",
        "time/2",
        "time/3",
    }
    assert held_out_loss(ema, data, tiny.encoder(), text="texts", bins=4)["loss"] == pytest.approx(
        after["loss"], abs=1e-6
    )
    assert record.demos == [
        f"demos/step-00000{n}/guidance-{g}{e}"
        for n in (30, 60)
        for g in (1, 3)
        for e in ("-0.wav", "-1.wav", ".png")
    ]
    assert (tmp_path / record.demos[2]).read_bytes()[:4] == b"\x89PNG"


def test_refusals():
    made = tiny.unet()
    with pytest.raises(ValueError, match="the data has sample_rate 2000, the model 1000"):
        train(made, tiny.pieces(rate=2000), tiny.encoder(), settings())
    with torch.no_grad():
        made.body.down[0].conv1.weight.fill_(torch.inf)
    with pytest.raises(TrainingError, match="the loss became nan at step 1"):
        train(made, tiny.pieces(), tiny.encoder(), settings())
    for name, value, words in (
        ("ema_decay", 1.0, r"ema_decay must be in \[0, 1\), got 1.0"),
        ("text", "words", "text must be one of text, texts, tags"),
        ("time_sampler", "normal", "time_sampler must be one of"),
        ("condition_dropout", -0.1, "condition_dropout must be in"),
        ("steps", 0, "steps must be >= 1"),
        ("betas", (1.0, 0.9), "betas must be two numbers"),
        ("preset", "big", "preset must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            MusicTrainConfig(**{name: value})


def test_frechet_distance():
    torch.manual_seed(0)
    a = torch.randn(4000, 3, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(12, rel=1e-6)
    # Of independent dimensions: squared differences of deviations.
    b = a * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    want = sum((k - 1) ** 2 * float(a[:, i].var()) for i, k in enumerate((1, 2, 3)))
    assert frechet_distance(a, b) == pytest.approx(want, rel=0.02)
    with pytest.raises(ValueError, match="two sets of at least two vectors"):
        frechet_distance(a[:1], b)


def test_statistics_of_known_sounds():
    tones = torch.stack([tiny.tone(hz, 1.0, 4000) for hz in (200, 800)])[:, None]
    found = statistics(torch.cat([tones, torch.randn(1, 1, 4000).clamp(-3, 3) / 3]), 4000)
    assert found["centroid_hz"][:2].tolist() == pytest.approx([200, 800], rel=0.02)
    assert found["zero_crossings_hz"][:2].tolist() == pytest.approx([200, 800], rel=0.02)
    assert found["crest"][0] == pytest.approx(2**0.5, rel=1e-3) and found["rms"][
        1
    ] == pytest.approx(0.5**0.5, rel=1e-3)
    assert found["flatness"][2] > 100 * found["flatness"][0] and found["bandwidth_hz"][2] > 400
    bands = band_energies(tones, 4000)
    assert (bands.argmax(1)[0] < bands.argmax(1)[1]).all() and bands.max() == 0
    assert (
        features(tones, 4000).isfinite().all()
        and statistics(torch.zeros(1, 1, 4000), 4000)["centroid_hz"].isnan()
    )
    with pytest.raises(ValueError, match="at least 256 samples"):
        features(torch.zeros(1, 1, 100), 4000)
    assert spectrogram_picture(tones, ["a", "b"], 4000)[:4] == b"\x89PNG"


def test_judges_and_evaluation():
    train_data, test_data = tiny.pieces(24), tiny.pieces(10)
    judges = train_judges(train_data, test_data, 256, tiny.encoder(), steps=60)
    assert judges.ceiling["register"] == 1.0 and judges.chance["register"] == 0.5
    assert judges.retrieval["top1"] > 0.9 and judges.retrieval["chance1"] == pytest.approx(0.5)
    about = [r.about for r in test_data.rows]
    texts = [r.text for r in test_data.rows]
    real = torch.stack([test_data.crop(i, 256, np.random.default_rng(i)) for i in range(10)])
    register_metric("count", lambda made, other, rate, prompts: float(len(made) + rate))
    found = evaluate(real, texts, about, judges, ["count"])
    assert found.accuracy["register"] == 1.0 and found.metrics == {"count": 1010.0}
    assert found.shuffled["register"] == pytest.approx(40 / 90)
    swapped = evaluate(real.roll(1, 0), texts, about, judges)
    assert swapped.accuracy["register"] == 0.0 and swapped.retrieval["top1"] < 0.2
    json.dumps(found.to_json())
    with pytest.raises(
        ModuleNotFoundError, match="'fad' needs frechet-audio-distance; install it with"
    ):
        metric_of("fad")
    with pytest.raises(ValueError, match="metric must be one of fad, clap"):
        metric_of("mos")
    with pytest.raises(ValueError, match="10 sounds, 9 prompts and 10 descriptions"):
        evaluate(real, texts[:9], about, judges)
