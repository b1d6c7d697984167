# SPDX-License-Identifier: Apache-2.0
"""Scores, synthesiser, recipe, readers, crops: from notes to batches."""

import dataclasses
import json
import wave
import zipfile

import ernie_music_models as tiny
import numpy as np
import pytest
import torch

from tenfold.data.scores import Note, packaged_scores, read_score
from tenfold.ernie_music import read_audio, resample, write_audio
from tenfold.ernie_music.captions import LANGUAGES, caption, phrasings, tags
from tenfold.ernie_music.dataset import AudioTexts, MusicBatches, read_rows
from tenfold.ernie_music.diffusion import draw_times
from tenfold.ernie_music.recipe import RecipeConfig, make_rows, prepare, register_of
from tenfold.ernie_music.synth import INSTRUMENTS, render
from tenfold.ernie_music.train_config import MusicTrainConfig

SCORE = """<?xml version="1.0"?><score-partwise><work><work-title>A piece</work-title></work>
<identification><creator type="composer">N. N.</creator></identification>
<part-list><score-part id="P1"><part-name>Flute</part-name></score-part></part-list>
<part id="P1"><measure number="1">
<attributes><divisions>2</divisions><key><fifths>-2</fifths><mode>minor</mode></key></attributes>
<direction><sound tempo="90"/></direction>
<note><pitch><step>C</step><octave>4</octave></pitch><duration>2</duration></note>
<note><chord/><pitch><step>E</step><alter>-1</alter><octave>4</octave></pitch><duration>2</duration></note>
<note><grace/><pitch><step>D</step><octave>4</octave></pitch></note>
<note><rest/><duration>2</duration></note>
<note><pitch><step>G</step><octave>4</octave></pitch><duration>4</duration><tie type="start"/></note>
<backup><duration>8</duration></backup>
<note><pitch><step>C</step><octave>3</octave></pitch><duration>8</duration></note></measure>
<measure number="2">
<note><pitch><step>G</step><octave>4</octave></pitch><duration>1</duration><tie type="stop"/></note></measure>
</part></score-partwise>"""


def test_a_score_of_every_element(tmp_path):
    (tmp_path / "a.xml").write_text(SCORE)
    with zipfile.ZipFile(tmp_path / "a.mxl", "w") as archive:
        archive.writestr("META-INF/container.xml", "<x/>")
        archive.writestr("a.xml", SCORE)
    for name in ("a.xml", "a.mxl"):
        score = read_score(tmp_path / name)
        assert [(n.start, n.length, n.pitch) for n in score.notes] == [
            (0, 4, 48),
            (0, 1, 60),
            (0, 1, 63),
            (2, 2.5, 67),
        ]
        assert (score.composer, score.title, score.key, score.mode, score.tempo) == (
            "N. N.",
            "A piece",
            "G",
            "minor",
            90,
        )
        assert score.parts == ("Flute",)
        assert [(n.start, n.length, n.pitch) for n in score.melody()] == [(0, 1, 63), (2, 2.5, 67)]
    for text, words in (
        ("<x>", "is no MusicXML"),
        ("<score-timewise/>", "must be MusicXML by parts"),
        ("<score-partwise/>", "has no notes"),
    ):
        (tmp_path / "b.xml").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_score(tmp_path / "b.xml")
    with pytest.raises(ValueError, match="there are no scores of abba; there are: bach"):
        next(packaged_scores(["abba"]))


@pytest.fixture(scope="module")
def bach():
    return list(packaged_scores(["bach"], 6))


def test_the_packaged_scores(bach):
    assert len(bach) == 6 and all(s.composer == "Johann Sebastian Bach" for s in bach)
    chorale = next(s for s in bach if s.name == "bwv10.7.mxl")
    assert chorale.key == "G" and chorale.mode == "minor" and len(chorale.parts) >= 4
    assert all(36 <= n.pitch <= 90 and n.length > 0 for n in chorale.notes)


def peak(x, rate):
    spectrum = np.abs(np.fft.rfft(x * np.hanning(len(x))))
    return np.argmax(spectrum) * rate / len(x)


@pytest.mark.parametrize("instrument", sorted(INSTRUMENTS))
def test_instruments_are_in_tune(instrument):
    note = [Note(0, 2, 69, 0)]
    x = render(note, instrument, 0.5, 1.0, 8000, seed=(3,))
    assert x.dtype == np.float32 and len(x) == 8000 and np.abs(x).max() == pytest.approx(0.7)
    base = [440 * ratio for ratio in (0.5, 1, 2, 3, 3.93, 4)]
    assert min(abs(peak(x, 8000) - hz) for hz in base) < 4
    again = render(note, instrument, 0.5, 1.0, 8000, seed=(3,))
    assert (x == again).all()
    high = render([Note(0, 2, 100, 0)], instrument, 0.5, 1.0, 8000)
    spectrum = np.abs(np.fft.rfft(high))
    assert spectrum[3700:].max() < 0.05 * spectrum.max()  # nothing folds back
    with pytest.raises(ValueError, match="instrument must be one of piano"):
        render(note, "kazoo", 0.5, 1.0, 8000)
    with pytest.raises(ValueError, match="none of the notes sounds"):
        render([Note(9, 1, 60, 0)], instrument, 0.5, 1.0, 8000)


def test_texts():
    about = {
        "instrument": "violin",
        "register": "high",
        "tempo": "slow",
        "key": "F#",
        "mode": "minor",
        "composer": "Bach",
    }
    words = {"en": "violin", "de": "Violine", "fr": "violon", "es": "violín", "zh": "小提琴"}
    for language in LANGUAGES:
        made = [caption(about, language, i) for i in range(phrasings(language))]
        held = caption(about, language, -1)
        assert len({*made, held}) == len(made) + 1
        assert all(words[language].lower() in t.lower() and "{" not in t for t in (*made, held))
    assert tags(about) == "violin, high register, slow, solo, F# minor, Bach"
    with pytest.raises(ValueError, match="language must be one of en"):
        caption(about, "la")


RECIPE = RecipeConfig(
    clips=6, test_clips=2, seconds=1.0, sample_rate=4000, composers=("bach",), scores=8
)


def test_recipe_of_too_few_scores():
    few = RecipeConfig(
        clips=1, test_clips=1, seconds=1.0, sample_rate=4000, composers=("bach",), scores=2
    )
    with pytest.raises(ValueError, match="of 2 scores none is left to test with; allow more"):
        make_rows(few)
    assert make_rows(dataclasses.replace(few, test_clips=0))["test"] == []


def test_recipe(tmp_path):
    made = make_rows(RECIPE)
    assert [len(made[n]) for n in ("train", "test")] == [6, 2]
    assert not {r["score"] for _, r in made["train"]} & {r["score"] for _, r in made["test"]}
    for x, row in made["train"]:
        assert (
            x.shape == (4000,)
            and register_of([row["median_pitch"]]) == row["register"]
            and len(row["texts"]) == 5
        )
    again = make_rows(RECIPE)
    assert all((a == b).all() and r == s for (a, r), (b, s) in zip(made["train"], again["train"]))
    files = prepare(tmp_path, RECIPE)
    rows = read_rows(files["train"])
    assert [r.text for r in rows] == [r["text"] for _, r in made["train"]]
    np.testing.assert_allclose(read_audio(rows[0].audio)[0][0], made["train"][0][0], atol=1 / 16000)
    before = files["train"].stat().st_mtime_ns
    prepare(tmp_path, RECIPE)
    assert files["train"].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="has data of another recipe"):
        prepare(tmp_path, RecipeConfig(clips=7, composers=("bach",)))
    for name, value, words in (
        ("instruments", ("kazoo",), "instruments must be one of"),
        ("languages", (), "languages must not be empty"),
        ("ensemble", 2.0, "ensemble must be in"),
        ("clips", 0, "clips must be >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            RecipeConfig(**{name: value})


def test_audio_files(tmp_path):
    x = torch.rand(2, 500) * 1.6 - 0.8
    for name, subtype, error in (
        ("a.wav", "int16", 2**-16),
        ("a.flac", "int24", 2**-24),
        ("b.wav", "float", 0),
    ):
        read, rate = read_audio(write_audio(tmp_path / name, x, 16000, subtype))
        assert rate == 16000 and (read - x).abs().max() <= error
    part, _ = read_audio(tmp_path / "a.wav", 100, 50)
    assert torch.equal(part, read_audio(tmp_path / "a.wav")[0][:, 100:150])
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, 500)
    with pytest.warns(UserWarning, match="reaches 3 and was clamped"):
        write_audio(tmp_path / "c.wav", torch.full((10,), 3.0), 16000)
    for audio, rate, error, words in (
        (torch.full((4,), torch.nan), 16000, ValueError, "values that are not finite"),
        (torch.zeros(4, dtype=torch.int16), 16000, TypeError, "must be a floating tensor"),
        (torch.zeros(4), 0, ValueError, "sample_rate must be a positive integer, got 0"),
        (torch.zeros(1, 1, 4), 16000, ValueError, r"audio must be \[C, S\] or \[S\]"),
    ):
        with pytest.raises(error, match=words):
            write_audio(tmp_path / "d.wav", audio, rate)
        assert not (tmp_path / "d.wav").exists()
    with pytest.raises(ValueError, match="sample rate of the audio must be known, got None"):
        resample(x, None, 8000)
    (tmp_path / "e.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="cannot be read as audio"):
        read_audio(tmp_path / "e.wav")
    tone = tiny.tone(50, 1.0, 2000)
    half = resample(tone, 2000, 1000)
    assert len(half) == 1000 and (half - tiny.tone(50, 1.0, 1000))[50:-50].abs().max() < 1e-2


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_readers(tmp_path):
    write_audio(tmp_path / "x.wav", tiny.tone(50), 1000)
    made = read_rows(
        lines(
            tmp_path / "a.jsonl",
            [{"audio": "x.wav", "texts": ["one", "two"], "tags": ["a", "b"], "key": "C"}],
        )
    )
    assert made[0].prompts("text") == ("one",) and made[0].prompts("texts") == ("one", "two")
    assert made[0].prompts("tags") == ("a, b",) and made[0].about == {"key": "C"}
    (tmp_path / "a.csv").write_text('path,text\nx.wav,"calm, slow"\n')
    assert read_rows(tmp_path / "a.csv")[0].prompts("texts") == ("calm, slow",)
    for rows, error, words in (
        ([{"text": "x"}], ValueError, "a.jsonl, line 1: a row needs the column 'audio'"),
        ([{"audio": "y.wav", "text": "x"}], FileNotFoundError, "a.jsonl, line 1: there is no file"),
        ([{"audio": "x.wav"}], ValueError, "needs 'text', 'texts' or 'tags'"),
        ([], ValueError, "has no rows"),
    ):
        with pytest.raises(error, match=words):
            read_rows(lines(tmp_path / "a.jsonl", rows))
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        read_rows(tmp_path / "a.jsonl")


def test_crops_from_files_and_from_memory_are_the_same(tmp_path):
    torch.manual_seed(0)
    smooth = resample(torch.rand(1, 500) * 1.6 - 0.8, 500, 2000)
    write_audio(tmp_path / "x.wav", smooth.clamp(-1, 1), 2000, "int16")
    rows = read_rows(lines(tmp_path / "a.jsonl", [{"audio": "x.wav", "text": "x"}]))
    kept, read = AudioTexts(rows, 1000, 2), AudioTexts(rows, 1000, 2, memory=0)
    for seed in range(20):
        a, b = (d.crop(0, 128, np.random.default_rng(seed)) for d in (kept, read))
        assert a.shape == (2, 128) and not read._kept
        assert (a - b).abs().max() < 1e-3
    long = kept.crop(0, 2000, np.random.default_rng(0))
    assert long.shape == (2, 2000) and (long[:, 1000:] == 0).all()


def test_batches_depend_on_seed_step_and_place_only():
    data = tiny.pieces(10)
    config = MusicTrainConfig.from_preset("small", batch_size=4, condition_dropout=0.5, seed=3)
    batches = MusicBatches(data, tiny.encoder(), config, 128)
    whole = batches.load(batches.take("train", 7, 4))
    again = MusicBatches(data, tiny.encoder(), config, 128)
    half = again.load({k: v[2:] for k, v in again.take("train", 7, 4).items()})
    for name in ("audio", "t", "place"):
        assert torch.equal(whole[name][2:], half[name]), name
    assert [batches.epoch(s) for s in (0, 2, 3)] == [0, 0, 1]
    numbers = torch.cat([batches.take("train", s, 5)["number"] for s in (0, 1)])
    assert sorted(numbers.tolist()) == list(range(10))
    drops = [int(batches.load(batches.take("train", s, 4))["mask"].any(1).sum()) for s in range(20)]
    assert 20 < sum(drops) < 60


def test_times():
    t = torch.cat([draw_times(0, s, 64) for s in range(50)])
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.02
    assert torch.equal(draw_times(0, 3, 64), draw_times(0, 3, 64)) and not torch.equal(
        draw_times(0, 3, 64), draw_times(1, 3, 64)
    )
    even = torch.cat([draw_times(0, s, 16, "sobol") for s in range(4)])
    counts = torch.histc(even, 16, 0, 1)
    assert (
        counts == 4
    ).all()  # 64 consecutive points of the sequence: each sixteenth has its share
    crash = draw_times(0, 3, 64, warp="crash")
    assert (crash < draw_times(0, 3, 64)).all()
