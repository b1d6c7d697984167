# SPDX-License-Identifier: Apache-2.0
"""``tenfold pixelgpt``: text as pictures for models that read pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold.cli import pixelgpt_models as models
from tenfold.cli.common import friendly, out, write_json

app = typer.Typer(help="PixelGPT: models that read rendered text.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="print the result as JSON, nothing else")]


@app.command()
@friendly
def render(
    text: Annotated[str, typer.Argument(help="a text, or a file of UTF-8 text: one text per line")],
    file: Annotated[Path, typer.Option("--out", help="the picture, PNG")],
    pair: Annotated[str | None, typer.Option(help="second text of a pair")] = None,
    words: Annotated[bool, typer.Option("--words", help="each word on patches of its own")] = False,
    wrap: Annotated[bool, typer.Option("--wrap", help="long texts over several strips")] = False,
    stride: Annotated[int, typer.Option(min=0, help="with --wrap, patches that come again")] = 0,
    mode: Annotated[str, typer.Option(help="rgb, gray or binary")] = "rgb",
    font: Annotated[
        list[str] | None, typer.Option(help="font file; may be repeated, first come first")
    ] = None,
    font_size: Annotated[float, typer.Option(help="points")] = 8.0,
    dpi: Annotated[int, typer.Option(min=1, help="dots per inch")] = 120,
    patches: Annotated[int, typer.Option(min=2, help="patches of a strip")] = 1024,
    direction: Annotated[str, typer.Option(help="auto, ltr or rtl")] = "auto",
    on_missing: Annotated[
        str, typer.Option(help="no font has a character: warn, box, skip or error")
    ] = "warn",
    across: Annotated[int, typer.Option(min=1, help="patches per row of the picture")] = 48,
    scale: Annotated[int, typer.Option(min=1, help="pixels per pixel")] = 2,
    grid: Annotated[bool, typer.Option("--grid", help="a line between patches")] = False,
    json: Json = False,
) -> None:
    """Render text as a model sees it and write it as a picture."""
    import warnings

    from tenfold.pixelgpt.picture import stack, strip_picture, write_png
    from tenfold.pixelgpt.processor import PixelProcessor

    processor = PixelProcessor(font or None, font_size=font_size, dpi=dpi, max_patches=patches, mode=mode,
                               direction=direction, on_missing=on_missing)  # fmt: skip
    texts = _texts(text)
    if pair is not None and len(texts) != 1:
        raise ValueError(f"--pair goes with one text, got {len(texts)}")
    given = [t.split() for t in texts] if words else texts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = processor(given, None if pair is None else [pair], overflow="wrap" if wrap else "clip",
                          stride=stride, return_sep_patches=True, return_tensors="np")  # fmt: skip
    counts = batch.num_patches.tolist()
    pictures = [
        strip_picture(strip, wrap=across, num_patches=n, scale=scale, grid=grid)
        for strip, n in zip(batch.pixel_values, counts)
    ]
    path = write_png(stack(pictures, 6 * scale), file)
    told = list(dict.fromkeys(str(w.message) for w in caught))
    if json:
        write_json({"picture": str(path), "num_patches": counts, "sep_patches": batch.sep_patches,
                    "warnings": told, "fonts": [f.path.name for f in processor.fonts]})  # fmt: skip
        return
    for line in told:
        out.print(f"warning: {line}", highlight=False, soft_wrap=True)
    strips = "1 strip" if len(counts) == 1 else f"{len(counts)} strips"
    out.print(f"{strips} of {', '.join(map(str, counts[:8]))}{' ...' if len(counts) > 8 else ''} patches: {path}",
              highlight=False, soft_wrap=True)  # fmt: skip


def _texts(given: str) -> list[str]:
    """The lines of a file, or the text itself."""
    path = Path(given)
    try:
        is_file = len(given) < 4096 and path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a zero byte
        is_file = False
    if not is_file:
        return [given]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{given} is not UTF-8 text: {error}") from None
    kept = [line for line in lines if line.strip()]
    if not kept:
        raise ValueError(f"{given} has no text")
    return kept


models.add_to(app)
