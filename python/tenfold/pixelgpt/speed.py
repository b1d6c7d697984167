# SPDX-License-Identifier: Apache-2.0
"""Texts rendered per second, against the reference's way of doing it, in one run.

    python -m tenfold.pixelgpt.speed --json render.json

The reference draws each text by one call of a library on a canvas of the whole strip, takes the canvas as an array and
draws the separator. Here that is done with Pillow and, where it is installed, with pygame (which the
reference uses). All make the same thing: [3, 16, 16384] uint8 strips of the same texts in the same font and size, and
the same number of patches within the difference of their spacing. The providers take turns; the reference's ways, which
are slow, get fewer texts. pygame is timed on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.pixelgpt.fonts import packaged_font
from tenfold.pixelgpt.processor import PixelProcessor
from tenfold.pixelgpt.saved import versions
from tenfold.pixelgpt.strips import MARGIN, next_patch

PATCH, PATCHES, EM = 16, 1024, 40 / 3
WIDTH = PATCH * PATCHES
Render = Callable[[Sequence[str], int], np.ndarray]


def texts(length: int, count: int) -> list[str]:
    """Different passages of Python's reference, on one line each."""
    from tenfold.data import long_documents

    found = long_documents(("reference",), min_chars=500)
    whole = " ".join(" ".join(d.text.split()) for d in found)
    step = max((len(whole) - length) // count, 1)
    return [whole[i * step : i * step + length] for i in range(count)]


def shares(name: str, count: int) -> int:
    """How many texts a provider is given."""
    return min(count, {"Pillow": 16, "pygame": 4}.get(name, count))


def _finish(strip: np.ndarray, width: int) -> np.ndarray:
    """[16, W, 3] with its black patch, as [3, 16, W]."""
    end = next_patch(MARGIN + width + MARGIN, PATCH, WIDTH)
    strip[:, end : end + PATCH] = 0
    return np.ascontiguousarray(strip.transpose(2, 0, 1))


def pillow() -> Render:
    """One call of Pillow per text on the whole canvas."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(packaged_font()), EM)

    def one(text: str) -> np.ndarray:
        canvas = Image.new("RGB", (WIDTH, PATCH), "white")
        ImageDraw.Draw(canvas).text((MARGIN, 0), text, "black", font)
        return _finish(np.array(canvas), round(font.getlength(text)))

    return _each(one)


def pygame() -> Render:
    """The same by pygame's FreeType, the reference's backend; ImportError where it is not installed."""
    import pygame.freetype

    pygame.freetype.init()
    font = pygame.freetype.Font(str(packaged_font()), EM)

    def one(text: str) -> np.ndarray:
        canvas = pygame.Surface((WIDTH, PATCH))
        canvas.fill("white")
        width = font.render_to(canvas, (MARGIN, 1), text, "black").width
        return _finish(pygame.surfarray.array3d(canvas).swapaxes(0, 1), width)

    return _each(one)


def _each(one: Callable[[str], np.ndarray]) -> Render:
    """A batch by a function of one text, on a pool of threads if asked."""
    pools: dict[int, ThreadPoolExecutor] = {}

    def render(some: Sequence[str], threads: int) -> np.ndarray:
        if threads == 1:
            return np.stack([one(t) for t in some])
        pool = pools.setdefault(threads, ThreadPoolExecutor(threads))
        return np.stack(list(pool.map(one, some)))

    return render


def ours(padding: str = "max_length") -> Render:
    """``PixelProcessor`` with the same font."""
    processor = PixelProcessor(packaged_font(), max_patches=PATCHES)

    def render(some: Sequence[str], threads: int) -> np.ndarray:
        made = processor(list(some), padding=padding, num_threads=threads, return_tensors="np")
        return made["pixel_values"]

    return render


def providers() -> dict[str, Render]:
    """What is installed here."""
    found = {"tenfold": ours(), "tenfold, longest": ours("longest"), "Pillow": pillow()}
    with contextlib.suppress(ImportError):
        found["pygame"] = pygame()
    return found


def agree(found: dict[str, Render]) -> None:
    """ValueError unless the providers draw the same amount of text in the same place, within their spacing."""
    some = texts(200, 4)
    patches, ink = {}, {}
    for name, render in found.items():
        strips = render(some, 1)[:, 0].astype(np.int64)
        black = (strips.reshape(len(some), PATCH, -1, PATCH).max((1, 3)) == 0).argmax(1)
        patches[name] = black
        ink[name] = (255 - strips).sum()
    for name in found:
        if (
            np.abs(patches[name] - patches["tenfold"]).max() > 3
            or not 0.8 < ink[name] / ink["tenfold"] < 1.25
        ):
            raise ValueError(f"{name} draws something else: {patches}, {ink}")


def measure(
    lengths: Sequence[int], threads: Sequence[int], count: int = 64, rounds: int = 7
) -> list[dict[str, Any]]:
    """A row per provider, length and number of threads: strips per second (median, and the extremes).

    ``ratio`` is to the fastest of the reference's ways in the same cell.
    """
    found = providers()
    agree(found)
    rows = []
    for length in lengths:
        some = texts(length, count)
        for number in threads:
            taking = {n: r for n, r in found.items() if number == 1 or n != "pygame"}
            times: dict[str, list[float]] = {name: [] for name in taking}
            for at in range(rounds + 1):
                order = list(taking)
                for name in order[at % len(order) :] + order[: at % len(order)]:
                    start = time.perf_counter()
                    taking[name](some[: shares(name, count)], number)
                    if at:  # the first fills caches
                        seconds = time.perf_counter() - start
                        times[name].append(shares(name, count) / seconds)
            speed = {name: statistics.median(t) for name, t in times.items()}
            best = max(v for name, v in speed.items() if not name.startswith("tenfold"))
            rows += [
                {"provider": name, "characters": length, "threads": number, "per_second": speed[name],
                 "spread": [min(times[name]), max(times[name])], "ratio": speed[name] / best}
                for name in taking
            ]  # fmt: skip
    return rows


def first_texts(length: int, count: int) -> float:
    """Texts per second with empty caches."""
    render, some = ours(), texts(length, count)
    start = time.perf_counter()
    render(some, 1)
    return count / (time.perf_counter() - start)


COLUMNS = ("renderer", "characters", "threads", "strips per second", "ratio")


def table_rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of a table, for ``COLUMNS``."""
    return [
        [
            r["provider"],
            str(r["characters"]),
            str(r["threads"]),
            f"{r['per_second']:.0f}",
            f"{r['ratio']:.1f}x",
        ]
        for r in found
    ]


def main() -> None:
    """Prints the rows and writes them."""
    parser = argparse.ArgumentParser(prog="python -m tenfold.pixelgpt.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--length", type=int, nargs="+", default=[20, 200, 2000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where the rows are written")
    chosen = parser.parse_args()
    cold = {str(n): first_texts(n, chosen.count) for n in chosen.length}
    rows = measure(chosen.length, chosen.threads, chosen.count, chosen.rounds)
    for row in table_rows(rows):
        print("  ".join(row))
    print("with empty caches:", {k: round(v) for k, v in cold.items()})
    if chosen.json:
        setting = {
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "count": chosen.count,
            "rounds": chosen.rounds,
            "versions": versions(),
            "cold": cold,
        }
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
