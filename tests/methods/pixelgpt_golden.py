# SPDX-License-Identifier: Apache-2.0
"""The committed pictures of rendered strips, and what they are of.

    python tests/methods/pixelgpt_golden.py    # draws them anew: look at them before committing

They are drawn by the font of matplotlib's wheel with the pinned uharfbuzz and freetype-py, so they are compared bit
by bit.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from tenfold.pixelgpt import PixelProcessor
from tenfold.pixelgpt.fonts import packaged_font
from tenfold.pixelgpt.picture import stack, strip_picture

FOLDER = Path(__file__).parent / "golden"
L = 32
CASES = {
    "latin": (["The quick brown fox jumps over 13 lazy dogs.", "AVATAR fi ffl To. Wa Ångström Łódź naïve"], {}),
    "greek_cyrillic": (["Ξεσκεπάζω τὴν ψυχοφθόρα", "Съешь ещё этих булок"], {}),
    "right_to_left": (["السلام عليكم", "שלום (עולם) 123", "read قرأ 12.5 كتب twice"], {}),
    "marks": (["e\u0301 o\u0308\u0304 a\u0323\u0302 ก Z\u0351\u0343\u035b\u0346 ẤỖg",
               "ש\u05b8\u05c1לו\u05b9ם م\u064fح\u064eم\u0651\u064eد"], {"on_missing": "box"}),
    "pair": ([("A premise about foxes.", "A hypothesis.")], {}),
    "words": ([["Each", "word", "starts", "on", "a", "patch"]], {}),
    "clipped": (["clipped text " * 9], {"max_patches": 8}),
    "binary": (["gray becomes binary"], {"mode": "binary"}),
    "gray": (["gray \u2603 😀"], {"mode": "gray"}),
    "colours": (["dark red on straw"], {"foreground": (120, 0, 20), "background": (255, 244, 200)}),
}  # fmt: skip


def draw(name: str) -> np.ndarray:
    """The picture of a case."""
    given, settings = CASES[name]
    processor = PixelProcessor(packaged_font(), **{"max_patches": L, **settings})
    batch = processor(given, return_tensors="np")
    return stack([strip_picture(s, wrap=L) for s in batch.pixel_values], gap=2)


def committed(name: str) -> np.ndarray:
    """What is in the repository."""
    with Image.open(FOLDER / f"{name}.png") as image:
        return np.array(image.convert("RGB"))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        Image.fromarray(draw(case)).save(FOLDER / f"{case}.png", optimize=True)
        print(FOLDER / f"{case}.png")
