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
    "latin": (["The quick brown fox jumps over 13 lazy dogs.", "AVATAR fi ffl To. Wa \u00c5ngstr\u00f6m \u0141\u00f3d\u017a na\u00efve"], {}),
    "greek_cyrillic": (["\u039e\u03b5\u03c3\u03ba\u03b5\u03c0\u03ac\u03b6\u03c9 \u03c4\u1f74\u03bd \u03c8\u03c5\u03c7\u03bf\u03c6\u03b8\u03cc\u03c1\u03b1", "\u0421\u044a\u0435\u0448\u044c \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u0431\u0443\u043b\u043e\u043a"], {}),
    "right_to_left": (["\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645", "\u05e9\u05dc\u05d5\u05dd (\u05e2\u05d5\u05dc\u05dd) 123", "read \u0642\u0631\u0623 12.5 \u0643\u062a\u0628 twice"], {}),
    "marks": (["e\u0301 o\u0308\u0304 a\u0323\u0302 \u0e01 Z\u0351\u0343\u035b\u0346 \u1ea4\u1ed6g", "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f"], {"on_missing": "box"}),
    "pair": ([("A premise about foxes.", "A hypothesis.")], {}),
    "words": ([["Each", "word", "starts", "on", "a", "patch"]], {}),
    "clipped": (["clipped text " * 9], {"max_patches": 8}),
    "binary": (["gray becomes binary"], {"mode": "binary"}),
    "gray": (["gray \u2603 \U0001f600"], {"mode": "gray"}),
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
