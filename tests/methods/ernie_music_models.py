# SPDX-License-Identifier: Apache-2.0
"""Small U-Nets, rows and pipelines that the tests of ERNIE-Music share."""

import numpy as np
import torch

from tenfold.ernie_music import BagText, ErnieMusicConfig, ErnieMusicPipeline, ErnieMusicUNet1D
from tenfold.ernie_music.dataset import AudioTexts, Row

TINY = {
    "widths": (16, 16, 32),
    "attn_levels": (3,),
    "head_dim": 16,
    "layers_per_level": 1,
    "sample_rate": 1000,
    "sample_size": 128,
    "channels": 1,
    "text_dim": 16,
    "fuse": "sum",
    "condition_dropout": 0.1,
    "text_encoder": "bag:16",
}


def config(**changes):
    return ErnieMusicConfig(**(TINY | changes))


def unet(seed=0, **changes):
    torch.manual_seed(seed)
    return ErnieMusicUNet1D(config(**changes))


def encoder():
    return BagText(16)


def pipeline(seed=0, **changes):
    made = ErnieMusicPipeline(unet(seed, **changes), text_encoder=encoder())
    made.set_progress_bar_config(disable=True)
    return made


def tone(hz, seconds=0.5, rate=1000):
    return torch.from_numpy(
        np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate).astype(np.float32)
    )


def pieces(count=12, rate=1000):
    """Tones of two pitches with texts that say which."""
    rows = []
    for i in range(count):
        low = i % 2 == 0
        wave = 0.8 * tone((60 if low else 180) + i, rate=rate)[None]
        word = "low" if low else "high"
        about = {"instrument": "sine", "register": word, "tempo": "slow"}
        rows.append(
            Row(
                wave,
                f"a {word} tone",
                (f"a {word} tone", f"{word} sound"),
                f"{word}, tone",
                about,
                rate,
            )
        )
    return AudioTexts(rows, rate, 1)
