# SPDX-License-Identifier: Apache-2.0
"""How good generated audio is: attributes against prompts, texts found, spectra, and plugged-in scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.ernie_music.dataset import AudioTexts
from tenfold.ernie_music.judges import AttributeClassifier, TextAudioJudge, crops_of
from tenfold.ernie_music.pipeline import ErnieMusicPipeline
from tenfold.ernie_music.spectral import STATISTICS, features, frechet_distance, statistics

# A metric: (generated [N, C, S], real [M, C, S], sample rate, prompts) -> a number.
Metric = Callable[[Tensor, Tensor, int, Sequence[str]], float]


def _fad(generated: Tensor, real: Tensor, sample_rate: int, prompts: Sequence[str]) -> float:
    """Fréchet audio distance by the package frechet-audio-distance (VGGish at 16 kHz)."""
    from frechet_audio_distance import FrechetAudioDistance

    from tenfold.ernie_music.audio import resample

    judge = FrechetAudioDistance(
        model_name="vggish", sample_rate=16000, use_pca=False, use_activation=False
    )
    sets = [
        [resample(w.mean(0), sample_rate, 16000).numpy() for w in x.cpu()]
        for x in (generated, real)
    ]
    (m1, s1), (m2, s2) = (
        judge.calculate_embd_statistics(judge.get_embeddings(x, sr=16000)) for x in sets
    )
    return float(judge.calculate_frechet_distance(m1, s1, m2, s2))


def _clap(generated: Tensor, real: Tensor, sample_rate: int, prompts: Sequence[str]) -> float:
    """Mean cosine of audio and prompt by the package laion-clap (48 kHz)."""
    import laion_clap

    from tenfold.ernie_music.audio import resample

    judge = laion_clap.CLAP_Module(enable_fusion=False)
    judge.load_ckpt()
    waves = np.stack([resample(w.mean(0), sample_rate, 48000).numpy() for w in generated.cpu()])
    audio = judge.get_audio_embedding_from_data(x=waves, use_tensor=False)
    text = judge.get_text_embedding(list(prompts))
    return float((audio * text).sum(1).mean())


_INSTALLED: dict[str, tuple[str, str, Metric]] = {
    "fad": ("frechet_audio_distance", "frechet-audio-distance", _fad),
    "clap": ("laion_clap", "laion-clap", _clap),
}
_OWN: dict[str, Metric] = {}


def register_metric(name: str, metric: Metric) -> None:
    """Makes a metric known under a name: (generated [N, C, S], real [M, C, S], sample rate, prompts) -> number."""
    _OWN[name] = metric


def metric_of(name: str) -> Metric:
    """A registered metric, ``"fad"`` or ``"clap"``.

    ModuleNotFoundError says what to install, ValueError what there is.
    """
    if name in _OWN:
        return _OWN[name]
    if name not in _INSTALLED:
        raise ValueError(f"metric must be one of {', '.join((*_INSTALLED, *_OWN))}, got {name!r}")
    module, package, metric = _INSTALLED[name]
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"the metric {name!r} needs {package}; install it with `pip install {package}`"
        )
    return metric


@dataclass
class Judges:
    """Judges trained on real audio, and how right they are about real audio that they never heard.

    Attributes:
        ceiling: accuracies on held-out real crops. chance: of always saying the commonest class. retrieval: of real
            crops.
    """

    attributes: AttributeClassifier
    texts: TextAudioJudge | None
    length: int
    ceiling: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    retrieval: dict[str, float] = field(default_factory=dict)
    real: Tensor = field(default_factory=lambda: torch.empty(0))


def train_judges(
    train: AudioTexts,
    test: AudioTexts,
    length: int,
    encoder: Any = None,
    *,
    steps: int = 400,
    seed: int = 0,
) -> Judges:
    """Trains the judges on crops of real pieces and measures them on held-out ones."""
    classifier = AttributeClassifier(train.sample_rate).fit(train, length, steps=steps, seed=seed)
    judge = None
    if encoder is not None:
        judge = TextAudioJudge(train.sample_rate, encoder).fit(
            train, length, steps=steps, seed=seed
        )
    made = Judges(classifier, judge, length)
    made.real, rows = crops_of(test, length, 1, seed + 1)
    about = [test.rows[i].about for i in rows.tolist()]
    made.ceiling = classifier.accuracy(made.real, about)
    for name in classifier.attributes:
        counts = [sum(str(a[name]) == c for a in about) for c in classifier.classes[name]]
        made.chance[name] = max(counts) / len(about)
    if judge is not None:
        made.retrieval = judge.retrieval(
            made.real, [test.rows[i].text for i in rows.tolist()], about
        )
    return made


@dataclass
class Evaluation:
    """What was found about generated audio.

    Attributes:
        accuracy: share of sounds with the prompt's attribute, by attribute. chance, ceiling: see :class:`Judges`.
        shuffled: the same accuracies against other prompts: what a model that ignores them would get.
        retrieval: see :meth:`TextAudioJudge.retrieval`; real_retrieval: of real audio.
        statistics: by name (mean generated, mean real). frechet: distance of features; frechet_real: of two halves of
            the real audio. metrics: plugged in. predicted: classes by attribute, about: what was asked for, prompts.
    """

    accuracy: dict[str, float]
    shuffled: dict[str, float]
    chance: dict[str, float]
    ceiling: dict[str, float]
    retrieval: dict[str, float]
    real_retrieval: dict[str, float]
    statistics: dict[str, tuple[float, float]]
    frechet: float
    frechet_real: float
    metrics: dict[str, float]
    count: int
    prompts: list[str]
    about: list[dict[str, Any]]
    predicted: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))


COLUMNS = ("attribute", "generated", "against other prompts", "commonest class", "real audio")


def attribute_rows(found: Evaluation) -> list[list[str]]:
    """Rows for ``COLUMNS``: accuracies in per cent."""
    return [
        [
            n,
            *(
                f"{100 * v[n]:.0f} %"
                for v in (found.accuracy, found.shuffled, found.chance, found.ceiling)
            ),
        ]
        for n in found.accuracy
    ]


def generate(
    pipeline: ErnieMusicPipeline,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
    step: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Tensor:
    """Waveforms [N, C, S] of prompts; each has a seed of its own, so it depends on no other.

    ``options`` go to the pipeline.
    """
    made = []
    for at in range(0, len(prompts), batch_size):
        part = list(prompts[at : at + batch_size])
        generators = [
            torch.Generator().manual_seed(seed * 100_003 + at + i) for i in range(len(part))
        ]
        made.append(pipeline(part, generator=generators, output_type="pt", **options).audios)  # type: ignore[union-attr]
        step(f"generated {at + len(part)} of {len(prompts)}")
    return torch.cat(made)


def evaluate(
    audio: Tensor,
    prompts: Sequence[str],
    about: Sequence[dict[str, Any]],
    judges: Judges,
    metrics: Sequence[str] = (),
) -> Evaluation:
    """Judges generated audio [N, C, S] of prompts that ask for the attributes in ``about``.

    Raises ValueError for lists of other lengths, ModuleNotFoundError for metrics that are not installed.
    """
    if not len(audio) == len(prompts) == len(about):
        raise ValueError(
            f"{len(audio)} sounds, {len(prompts)} prompts and {len(about)} descriptions do not go together"
        )
    chosen = {name: metric_of(name) for name in metrics}
    rate, classifier = judges.attributes.sample_rate, judges.attributes
    audio = audio[..., : judges.length]
    predicted = classifier.predict(audio)
    accuracy, shuffled = {}, {}
    for name in classifier.attributes:
        asked = [str(a[name]) for a in about]
        accuracy[name] = float(np.mean([p == a for p, a in zip(predicted[name], asked)]))
        # Against all other prompts at once: the mean over every way of mixing them up.
        pairs = [
            p == a for i, p in enumerate(predicted[name]) for j, a in enumerate(asked) if i != j
        ]
        shuffled[name] = float(np.mean(pairs)) if pairs else 0.0
    retrieval = judges.texts.retrieval(audio, prompts, about) if judges.texts is not None else {}
    ours, real = statistics(audio, rate), statistics(judges.real, rate)
    heard, others = features(audio, rate), features(judges.real, rate)
    half = len(others) // 2
    return Evaluation(
        accuracy,
        shuffled,
        judges.chance,
        judges.ceiling,
        retrieval,
        judges.retrieval,
        {n: (float(ours[n].nanmean()), float(real[n].nanmean())) for n in STATISTICS},
        frechet_distance(heard, others) if min(len(heard), len(others)) > 1 else float("nan"),
        frechet_distance(others[:half], others[half:]) if half > 1 else float("nan"),
        {n: m(audio, judges.real, rate, prompts) for n, m in chosen.items()},
        len(audio),
        list(prompts),
        [dict(a) for a in about],
        predicted,
    )
