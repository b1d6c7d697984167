# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: all modalities, the best weights, early stopping, resumption, scores by language, what is refused."""

import random

import pixelgpt_runs as runs
import pytest
import torch

from tenfold.pixelgpt.classifier import classifier_of
from tenfold.pixelgpt.finetuning import finetune, predict, score
from tenfold.pixelgpt.tasks import Example, TaskSpec
from tenfold.pixelgpt.train_config import FineTuneConfig

LANGUAGES = ("il", "mw")  # words of narrow letters, and of wide ones


def settings(modality, **changes):
    given = {"steps": 24, "batch_size": 8, "length": 16, "eval_every": 4, "learning_rate": 3e-3, "seed": 0,
             "checkpoint_every": 100, "warmup_steps": 2, "modality": modality}  # fmt: skip
    return FineTuneConfig.from_preset("small", **(given | changes))


def data():
    draw = random.Random(0)
    made = [Example("".join(draw.choices(LANGUAGES[i % 2], k=draw.randint(3, 9))), None, i % 2, LANGUAGES[i % 2])
            for i in range(104)]  # fmt: skip
    return TaskSpec("letters", labels=LANGUAGES), made[:80], made[80:]


def tuned(modality, **options):
    spec, train, test = data()
    changes = {k: options.pop(k) for k in list(options) if k in FineTuneConfig.__dataclass_fields__}
    model = classifier_of(runs.model(), spec.num_labels)
    record = finetune(model, spec, train, test, settings(modality, **changes), processor=runs.processor(),
                      tokenizer=runs.tokenizer(), **options)  # fmt: skip
    return model, record


@pytest.mark.parametrize("modality", ["pixel", "text", "pair"])
def test_learns_to_tell_letters_apart(modality):
    _, _, test = data()
    model, record = tuned(modality, tests={"test": test})
    assert record.best["accuracy"] >= 0.9, record.validation
    assert (
        record.scores["test"]["accuracy"] == record.best["accuracy"]
    )  # the best weights are in the model
    assert set(record.scores["test"]) == {"accuracy", "accuracy/il", "accuracy/mw", "average"}
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    assert (record.trained < record.parameters) == (modality != "pair")


def test_early_stopping_and_patience():
    spec, train, test = data()
    constant = [Example(e.text, None, 0, e.language) for e in test]
    model = classifier_of(runs.model(), 2)
    record = finetune(model, spec, train, constant, settings("text", patience=2, learning_rate=1e-9, steps=40),
                      tokenizer=runs.tokenizer())  # fmt: skip
    assert (
        record.best["step"] == 4 and len(record.curve) == 12 and record.curve[-1]["stopped"] == 1.0
    )


def test_resumed_run_is_the_same(tmp_path):
    class Stop(Exception):
        pass

    def callback(progress):
        if progress.step == 14:
            raise Stop

    whole, want = tuned("pixel")
    with pytest.raises(Stop):
        tuned("pixel", checkpoint_every=5, out=tmp_path, callback=callback)
    model, record = tuned("pixel", checkpoint_every=5, out=tmp_path)
    assert record.curve == want.curve and record.validation == want.validation
    assert record.best == want.best
    for p, q in zip(model.parameters(), whole.parameters()):
        assert torch.equal(p, q)
    assert (tmp_path / "processor_config.json").is_file() and (
        tmp_path / "tokenizer.json"
    ).is_file()


def test_regression():
    spec = TaskSpec("length", metric="spearman")
    lines = [Example("x" * n, None, n / 20) for n in range(1, 21)] * 2
    model = classifier_of(runs.model(), 1)
    record = finetune(
        model,
        spec,
        lines,
        lines[:20],
        settings("text", steps=40, length=32),
        tokenizer=runs.tokenizer(),
    )
    assert record.best["spearman"] > 0.9
    assert record.curve[-1]["loss"] < record.curve[0]["loss"]


def test_pairs_of_texts_and_order_of_predictions():
    spec = TaskSpec("same", labels=("no", "yes"))
    examples = [Example("a" * (1 + i % 5), "b" * (i % 3 + 1), i % 2) for i in range(9)]
    config = settings("pair")
    model = classifier_of(runs.model(), 2).eval()
    from tenfold.pixelgpt.collate import with_settings

    processor = with_settings(runs.processor(), max_patches=16)
    some = predict(model, examples, spec, processor, runs.tokenizer(), config, batch_size=4)
    each = torch.cat([predict(model, [e], spec, processor, runs.tokenizer(), config) for e in examples])  # fmt: skip
    torch.testing.assert_close(some, each, atol=1e-5, rtol=1e-5)
    found = score(some, examples, spec)
    assert set(found) == {"accuracy"}


@pytest.mark.parametrize("mode", ["gray", "binary"])
def test_grey_strips(mode):
    _, record = tuned("pixel", render_mode=mode, steps=4)
    assert record.config["render_mode"] == mode


def test_refused():
    spec, train, test = data()
    model = classifier_of(runs.model(), 3)
    with pytest.raises(ValueError, match=r"has 2 labels .*, the model 3"):
        finetune(model, spec, train, test, settings("text"), tokenizer=runs.tokenizer())
    model = classifier_of(runs.model(), 2)
    with pytest.raises(ValueError, match="needs a processor"):
        finetune(model, spec, train, test, settings("pixel"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        finetune(model, spec, train, test, settings("pair"), processor=runs.processor())
    with pytest.raises(ValueError, match="no examples"):
        finetune(model, spec, [], test, settings("text"), tokenizer=runs.tokenizer())
    with pytest.raises(ValueError, match="66 patches and tokens are longer than the model's 64"):
        finetune(
            model,
            spec,
            train,
            test,
            settings("pair", length=33),
            processor=runs.processor(),
            tokenizer=runs.tokenizer(),
        )
    with pytest.raises(ValueError, match="metric must be one of"):
        TaskSpec("x", metric="rouge")
    for changes, text in (({"modality": "audio"}, "modality"), ({"render_mode": "sepia"}, "render_mode"),
                          ({"patience": -1}, "patience")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            FineTuneConfig(**changes)
