# SPDX-License-Identifier: Apache-2.0
"""Tiny PixelGPTs, strips by Pillow's default font (as the acceptance checks want them), and batches of both kinds."""

import random

import numpy as np
import torch

from tenfold.pixelgpt.config import PixelGPTConfig
from tenfold.pixelgpt.model import make_model

PATCH = 16
WORDS = [
    "about",
    "water",
    "people",
    "house",
    "small",
    "light",
    "night",
    "world",
    "place",
    "right",
    "hand",
    "time",
    "year",
    "the",
    "and",
    "for",
    "with",
    "from",
    "that",
    "this",
    "have",
    "word",
    "point",
    "story",
    "line",
    "page",
    "letter",
    "find",
    "learn",
    "river",
    "green",
    "table",
    "voice",
    "paper",
    "number",
    "other",
    "before",
    "between",
    "mother",
    "question",
]


def config(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    return PixelGPTConfig(**(sizes | changes))


def model(seed=0, **changes):
    made = make_model(config(**changes), seed)
    for name, weight in made.named_parameters():
        if "norm" in name:  # a forgotten norm must not pass for the identity
            weight.data += 0.3 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(7)
            )
    return made.eval()


def noise(batch, patches, seed=0, channels=3):
    """Random strips uint8 [B, C, 16, 16 L]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (batch, channels, PATCH, PATCH * patches), generator=generator, dtype=torch.uint8
    )


def ids(batch, length, seed=0, vocab=97):
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask(lengths, size):
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def pillow_strips(count, seed=0, length=48, words=8):
    """Strips of random words in Pillow's default font, 13 px: (uint8 [N, 3, 16, 16 L], num_patches [N])."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    draw_word = random.Random(seed)
    made, counts = [], []
    for _ in range(count):
        text = " ".join(draw_word.choices(WORDS, k=words))
        image = Image.new("RGB", (PATCH * length, PATCH), "white")
        draw = ImageDraw.Draw(image)
        draw.text((2, 0), text, fill="black", font=font)
        end = min(-(-(4 + int(draw.textlength(text, font=font))) // PATCH), length - 1)
        draw.rectangle((end * PATCH, 0, end * PATCH + PATCH - 1, PATCH - 1), fill="black")
        draw.rectangle((end * PATCH + PATCH, 0, PATCH * length, PATCH - 1), fill="white")
        made.append(np.asarray(image))
        counts.append(end)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous(), torch.tensor(counts)
