# SPDX-License-Identifier: Apache-2.0
"""Small judges trained on real audio: which attributes a sound has, and which text belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.ernie_music.captions import ATTRIBUTES
from tenfold.ernie_music.dataset import AudioTexts
from tenfold.ernie_music.spectral import features


def crops_of(data: AudioTexts, length: int, per_row: int, seed: int) -> tuple[Tensor, Tensor]:
    """(waveforms [N, C, length], numbers of their rows [N]): ``per_row`` random crops of each piece that sound."""
    waves, rows = [], []
    for number in range(len(data)):
        for i in range(per_row):
            for attempt in range(4):
                rng = np.random.default_rng([seed, number, i, attempt])
                wave = data.crop(number, length, rng)
                if float(wave.abs().amax()) > 0.02:
                    waves.append(wave)
                    rows.append(number)
                    break
    if not waves:
        raise ValueError("none of the crops sounds")
    return torch.stack(waves), torch.tensor(rows)


def with_noise(waves: Tensor, seed: int) -> Tensor:
    """Waveforms [N, C, S] and, after them, the same with white noise 10 to 40 dB below them.

    Generated sounds have some; judges that never heard any would listen to nothing else.
    """
    made = torch.Generator().manual_seed(seed)
    level = 10 ** (-(10 + 30 * torch.rand(len(waves), 1, 1, generator=made)) / 20)
    rms = waves.square().mean((1, 2), keepdim=True).sqrt()
    return torch.cat([waves, waves + rms * level * torch.randn(waves.shape, generator=made)])


def _network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.2),
        nn.Linear(inputs, hidden),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Linear(hidden, outputs),
    )


class _Judge(nn.Module):
    """Features of sounds, standardised as the real ones were."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.center = self.scale = torch.empty(0)

    def heard(self, audio: Tensor) -> Tensor:
        """Standardised features [N, D] of waveforms [N, C, S]."""
        parts = [features(part, self.sample_rate) for part in audio.split(256)]
        return (torch.cat(parts) - self.center) / self.scale

    def _listen(self, audio: Tensor) -> Tensor:
        made = torch.cat([features(part, self.sample_rate) for part in audio.split(256)])
        self.center, self.scale = made.mean(0), made.std(0).clamp_min(1e-3)
        return (made - self.center) / self.scale


class AttributeClassifier(_Judge):
    """Instrument, register and tempo of a sound, by a network of two layers on features of bands over time.

    Args:
        sample_rate: Hz. attributes: names in the rows' ``about``.
    """

    def __init__(self, sample_rate: int, attributes: Sequence[str] = ATTRIBUTES) -> None:
        super().__init__(sample_rate)
        self.attributes = tuple(attributes)
        self.classes: dict[str, list[str]] = {}
        self.heads = nn.ModuleDict()

    def fit(
        self, data: AudioTexts, length: int, *, per_row: int = 4, steps: int = 400, seed: int = 0
    ) -> AttributeClassifier:
        """Learns from crops of real pieces. ValueError for rows without an attribute."""
        for name in self.attributes:
            if any(name not in row.about for row in data.rows):
                raise ValueError(
                    f"rows need the attribute {name!r}, which some of them do not have"
                )
            self.classes[name] = sorted({str(row.about[name]) for row in data.rows})
        waves, rows = crops_of(data, length, per_row, seed)
        x, rows = self._listen(with_noise(waves, seed)), torch.cat([rows, rows])
        labels = {
            n: self._labels(n, [data.rows[i].about for i in rows.tolist()]) for n in self.attributes
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in self.attributes:
                self.heads[name] = _network(x.shape[1], len(self.classes[name]), 96)
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.02)
            self.train()
            for _ in range(steps):
                batch = torch.randint(len(x), (min(128, len(x)),))
                loss = sum(
                    (
                        F.cross_entropy(self.heads[n](x[batch]), labels[n][batch])
                        for n in self.attributes
                    ),
                    torch.zeros(()),
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.eval()
        return self

    def _labels(self, name: str, about: Sequence[dict[str, Any]]) -> Tensor:
        known = {c: i for i, c in enumerate(self.classes[name])}
        return torch.tensor([known[str(a[name])] for a in about])

    @torch.no_grad()
    def predict(self, audio: Tensor) -> dict[str, list[str]]:
        """The class of every attribute for waveforms [N, C, S]."""
        x = self.heard(audio)
        return {
            n: [self.classes[n][i] for i in self.heads[n](x).argmax(1).tolist()]
            for n in self.attributes
        }

    def accuracy(self, audio: Tensor, about: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Share of sounds whose predicted class is what ``about`` says, by attribute."""
        found = self.predict(audio)
        return {
            n: float(np.mean([p == str(a[n]) for p, a in zip(found[n], about)]))
            for n in self.attributes
        }


class TextAudioJudge(_Judge):
    """Texts and sounds in one space, learnt from real pairs: how near is a sound to its text?

    Args:
        sample_rate: Hz. encoder: texts -> (states, mask), whose first state is read. width: of the space.
    """

    def __init__(self, sample_rate: int, encoder: Any, width: int = 32) -> None:
        super().__init__(sample_rate)
        self.encoder, self.width = encoder, width
        self.audio = self.text = nn.Sequential()

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.encoder(list(texts))[0][:, 0]

    def fit(
        self, data: AudioTexts, length: int, *, per_row: int = 4, steps: int = 400, seed: int = 0
    ) -> TextAudioJudge:
        """Learns from crops of real pieces and all their texts, by contrast within batches."""
        waves, rows = crops_of(data, length, per_row, seed)
        x, rows = self._listen(with_noise(waves, seed)), torch.cat([rows, rows])
        texts = [self._texts(row.prompts("texts")) for row in data.rows]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.audio = _network(x.shape[1], self.width, 128)
            self.text = _network(texts[0].shape[1], self.width, 128)
            optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.02)
            self.train()
            for _ in range(steps):
                batch = torch.randint(len(x), (min(96, len(x)),))
                words = torch.stack([_one_of(texts[i]) for i in rows[batch].tolist()])
                scores = 12 * self._score(self.audio(x[batch]), self.text(words))
                target = torch.arange(len(batch))
                loss = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.eval()
        return self

    @staticmethod
    def _score(audio: Tensor, text: Tensor) -> Tensor:
        return F.normalize(audio, dim=1) @ F.normalize(text, dim=1).T

    @torch.no_grad()
    def scores(self, audio: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines [N, M] of waveforms [N, C, S] and texts."""
        return self._score(self.audio(self.heard(audio)), self.text(self._texts(texts)))

    def retrieval(
        self,
        audio: Tensor,
        texts: Sequence[str],
        about: Sequence[dict[str, Any]],
        attributes: Sequence[str] = ATTRIBUTES,
    ) -> dict[str, float]:
        """How well sounds find their texts: ``top1`` and ``top5`` count a text with the same attributes as right.

        ``chance1``, ``chance5``: of a random order. ``rank``: mean share of texts before the first right one (0 is
        best, a random order has about half over the number of right ones).
        """
        keys = [tuple(str(a[n]) for n in attributes) for a in about]
        right = torch.tensor([[k == other for other in keys] for k in keys])
        order = self.scores(audio, texts).argsort(1, descending=True)
        hits = right.gather(1, order)
        first = hits.float().argmax(1).float()
        m = len(texts)
        share = right.float().sum(1)

        def chance(k: int) -> float:
            missed = torch.ones(len(share))
            for i in range(min(k, m)):
                missed *= ((m - share - i) / (m - i)).clamp_min(0)
            return float((1 - missed).mean())

        return {
            "top1": float(hits[:, 0].float().mean()),
            "top5": float(hits[:, :5].any(1).float().mean()),
            "chance1": chance(1),
            "chance5": chance(5),
            "rank": float((first / m).mean()),
        }


def _one_of(texts: Tensor) -> Tensor:
    return texts[int(torch.randint(len(texts), ()))]
