# SPDX-License-Identifier: Apache-2.0
"""``tenfold ernie-music``: all verbs on a tiny model; what they refuse; the demo's sections."""

import json
from pathlib import Path

import pytest
from cli_calls import fails, succeeds

from tenfold.ernie_music import read_audio

FEW = [
    "--clips",
    "10",
    "--test-clips",
    "4",
    "--seconds",
    "1",
    "--sample-rate",
    "4000",
    "--composers",
    "bach",
    "--scores",
    "8",
    "--instruments",
    "organ,marimba",
    "--quiet",
]
TRAIN = [
    "--size",
    "tiny",
    "--encoder",
    "bag:16",
    "--seconds",
    "0.128",
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--set",
    "log_every=2",
    "--quiet",
]


def train(place, out, *more):
    return succeeds(
        "ernie-music",
        "train",
        "--data",
        place / "data" / "train.jsonl",
        "--test",
        place / "data" / "test.jsonl",
        "--out",
        out,
        *TRAIN,
        *more,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with rendered scores and a model that has seen them."""
    folder = tmp_path_factory.mktemp("ernie_music")
    succeeds("ernie-music", "prepare", "--out", folder / "data", *FEW)
    train(
        folder, folder / "model", "--demo", "an organ", "--demo-every", "4", "--set", "demo_steps=2"
    )
    return folder


def test_prepare(place):
    found = json.loads(succeeds("ernie-music", "prepare", "--out", place / "data", *FEW, "--json"))
    rows = [json.loads(line) for line in Path(found["train"]).read_text().splitlines()]
    assert len(rows) == found["clips"] == 10 and {r["instrument"] for r in rows} == {
        "organ",
        "marimba",
    }
    wave, rate = read_audio(place / "data" / rows[0]["audio"])
    assert rate == 4000 and wave.shape == (1, 4000) and wave.abs().max() > 0.5


def test_train(place):
    found = json.loads(train(place, place / "other", "--json"))
    assert (
        found["steps"] == 4
        and found["validation"][-1]["step"] == 4
        and Path(found["report"]).is_file()
    )
    assert (place / "model" / "demos" / "step-0000004" / "guidance-3.wav").is_file()
    assert (place / "model" / "last" / "model.safetensors").is_file()
    again = json.loads(train(place, place / "more", "--model", place / "other", "--json"))
    assert again["loss"] != found["loss"]


def test_generate(place):
    out = place / "sounds" / "x.flac"
    found = json.loads(
        succeeds(
            "ernie-music",
            "generate",
            "an organ",
            "a marimba",
            "--model",
            place / "model",
            "--out",
            out,
            "--steps",
            "2",
            "--guidance",
            "2",
            "--negative",
            "noise",
            "--spectrogram",
            "--json",
        )
    )
    assert [Path(f).name for f in found["files"]] == ["x-0.flac", "x-1.flac"] and Path(
        found["pictures"][0]
    ).is_file()
    wave, rate = read_audio(found["files"][1])
    assert rate == 4000 and wave.shape[1] == found["seconds"] * 4000
    same = [
        "ernie-music",
        "generate",
        "an organ",
        "--model",
        place / "model",
        "--steps",
        "2",
        "--quiet",
        "--seed",
    ]
    waves = []
    for seed in ("1", "1", "2"):
        succeeds(*same, seed, "--out", place / f"s{len(waves)}.wav")
        waves.append(read_audio(place / f"s{len(waves)}.wav")[0])
    assert (waves[0] == waves[1]).all() and (waves[0] != waves[2]).any()
    source = next((place / "data" / "test").glob("*.wav"))
    succeeds(
        *same,
        "1",
        "--out",
        place / "i.wav",
        "--init",
        source,
        "--keep",
        "0-0.05",
        "--seconds",
        "0.1",
    )
    kept, known = read_audio(place / "i.wav")[0], read_audio(source)[0]
    assert kept.shape[1] == 400 and (kept[:, :200] - known[:, :200]).abs().max() < 1e-4
    succeeds(
        *same,
        "1",
        "--out",
        place / "j.wav",
        "--init",
        source,
        "--strength",
        "0.3",
        "--solver",
        "dpm++",
    )


def test_eval(place):
    found = json.loads(
        succeeds(
            "ernie-music",
            "eval",
            "--model",
            place / "model",
            "--data",
            place / "data" / "train.jsonl",
            "--test",
            place / "data" / "test.jsonl",
            "--out",
            place / "e",
            "--steps",
            "2",
            "--judge-steps",
            "20",
            "--json",
        )
    )
    assert found["count"] == 4 and set(found["accuracy"]) == {"instrument", "register", "tempo"}
    page = Path(found["report"]).read_text()
    assert page.count("<audio controls") == 4 and "data:audio/wav;base64," in page
    assert (
        json.loads((place / "e" / "evaluation.json").read_text())["accuracy"] == found["accuracy"]
    )


BAD = [
    (["prepare", "--out", "x", "--instruments", "kazoo"], "instruments must be one of piano"),
    (["prepare", "--out", "x", "--composers", "abba"], "composers must be one of bach"),
    (["prepare", "--out", "data", "--clips", "3", "--quiet"], "has data of another recipe"),
    (["train", "--data", "none.jsonl"], "there is no file none.jsonl"),
    (
        [
            "train",
            "--data",
            "data/train.jsonl",
            "--encoder",
            "bag:16",
            "--set",
            "time_sampler=normal",
        ],
        "time_sampler must be one of",
    ),
    (
        [
            "train",
            "--data",
            "data/train.jsonl",
            "--encoder",
            "bag:16",
            "--out",
            "model",
            *TRAIN[:-1],
            "--size",
            "huge",
        ],
        "preset must be one of paper",
    ),
    (
        ["train", "--data", "data/train.jsonl", "--encoder", "bag:24", "--model", "model"],
        "states are 24 wide, the U-Net takes 16",
    ),
    (["generate", "x", "--model", "data"], "has no model_index.json"),
    (
        ["generate", "x", "--model", "model", "--solver", "euler"],
        "solver must be one of ddim, dpm++",
    ),
    (
        ["generate", "x", "--model", "model", "--eta", "3", "--quiet"],
        "eta must be in [0, 1], got 3.0",
    ),
    (["generate", "x", "--model", "model", "--keep", "0-1"], "--keep needs --init"),
    (
        ["generate", "x", "--model", "model", "--init", "data/train.jsonl"],
        "cannot be read as audio",
    ),
    (
        ["generate", "x", "--model", "model", "--init", "nothing.wav"],
        "there is no file nothing.wav",
    ),
    (["eval", "--model", "model", "--metrics", "clap"], "'clap' needs laion-clap; install it with"),
    (["eval", "--model", "model", "--metrics", "mos"], "metric must be one of fad, clap"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(a[:4]) for a, _ in BAD])
def test_refusals(place, arguments, words, monkeypatch):
    monkeypatch.chdir(place)
    assert words in fails("ernie-music", *arguments)


def test_a_page_of_a_run():
    from tenfold.ernie_music import ErnieMusicConfig, study
    from tenfold.ernie_music.recipe import RecipeConfig
    from tenfold.ernie_music.train_config import MusicTrainConfig
    from tenfold.report import Page

    recipe = RecipeConfig(
        clips=12,
        test_clips=4,
        seconds=0.6,
        sample_rate=2000,
        instruments=("organ", "marimba"),
        composers=("bach",),
        scores=8,
        ensemble=0.0,
    )
    said = []
    made = study.run(
        recipe,
        ErnieMusicConfig.from_preset(
            "tiny",
            sample_rate=2000,
            sample_size=512,
            widths=(16, 16, 32),
            attn_levels=(3,),
            head_dim=16,
        ),
        MusicTrainConfig.from_preset("small", steps=4, batch_size=2, log_every=2),
        prompts=6,
        inference_steps=2,
        judge_steps=20,
        step=said.append,
        tell=2,
    )
    assert len(said) == 2 + 2 + 2 and said[-1] == "sounds with guidance 3 are judged"
    page = Page("x")
    study.add_section(page, made, recipe, sounds=2)
    assert page.render().count("<audio controls") == 5
    rows = study.guidance_rows(made)
    assert [r[0] for r in rows] == ["1", "3", "other prompts", "real audio"] and all(
        len(r) == 6 for r in rows
    )
