# SPDX-License-Identifier: Apache-2.0
"""What a renderer is set to: size, patches, colours, and what happens where no font has a glyph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

from tenfold.training.checks import integers, one_of, positive

MODES = ("rgb", "gray", "binary")
MISSING = ("warn", "box", "skip", "error")
DIRECTIONS = ("auto", "ltr", "rtl")
Color = tuple[int, int, int]


def luma(color: Sequence[int]) -> int:
    """ITU-R 601 luma of an 8-bit colour, rounded to nearest."""
    r, g, b = color
    return (299 * r + 587 * g + 114 * b + 500) // 1000


def _color(name: str, value: Any) -> Color:
    try:
        channels = tuple(int(c) for c in value)
    except (TypeError, ValueError):
        channels = ()
    if len(channels) != 3 or not all(0 <= c <= 255 for c in channels):
        raise ValueError(
            f"{name} must be three integers of 0 to 255 (red, green, blue), got {value!r}"
        )
    return channels  # type: ignore[return-value]


@dataclass(frozen=True)
class RenderSettings:
    """Everything but the fonts that decides a pixel (spec: PixelGPT section 3.1).

    Args:
        font_size: points; with ``dpi``, the em is ``font_size * dpi / 72`` pixels.
        patch_size: height of the strip and side of a patch, pixels.
        max_patches: patches of a strip (L).
        mode: ``rgb`` (3 channels; emoji in colour), ``gray`` (ITU-R 601 luma) or ``binary`` (luma over 127
            is 255, else 0).
        channels: 1 or 3 for ``gray`` and ``binary``; 3 repeats the one. Default: 3 for ``rgb``, else 1.
        foreground, background: colours of text and paper. Padding and space are paper; separators black.
        on_missing: no font has a character: ``warn`` (its font's box, and a warning with the code points),
            ``box`` (without the warning), ``skip`` (nothing is drawn) or ``error`` (ValueError).
        direction: of a paragraph: ``auto`` (its first strong character), ``ltr`` or ``rtl``.
        features: OpenType features switched on, or off with a leading ``-``.
    """

    font_size: float = 8.0
    dpi: int = 120
    patch_size: int = 16
    max_patches: int = 1024
    mode: str = "rgb"
    channels: int | None = None
    foreground: Color = (0, 0, 0)
    background: Color = (255, 255, 255)
    on_missing: str = "warn"
    direction: str = "auto"
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        integers(self, {"dpi": 1, "patch_size": 2, "max_patches": 2})
        positive("font_size", self.font_size)
        one_of("mode", self.mode, MODES)
        one_of("on_missing", self.on_missing, MISSING)
        one_of("direction", self.direction, DIRECTIONS)
        object.__setattr__(self, "channels", self._channels())
        for name in ("foreground", "background"):
            object.__setattr__(self, name, _color(name, getattr(self, name)))
        if isinstance(self.features, str) or not all(
            isinstance(f, str) and f for f in self.features
        ):
            raise TypeError(
                f"features must be OpenType tags like ('-liga', 'ss01'), got {self.features!r}"
            )
        object.__setattr__(self, "features", tuple(self.features))
        if self.em > 4 * self.patch_size:
            raise ValueError(
                f"font_size {self.font_size} at {self.dpi} dpi is an em of {float(self.em):.1f} pixels, over four "
                f"times patch_size {self.patch_size}"
            )

    def _channels(self) -> int:
        default = 3 if self.mode == "rgb" else 1
        channels = default if self.channels is None else self.channels
        if channels not in ((3,) if self.mode == "rgb" else (1, 3)):
            allowed = "3" if self.mode == "rgb" else "1 or 3"
            raise ValueError(
                f"channels must be {allowed} with mode {self.mode!r}, got {channels!r}"
            )
        return channels

    @property
    def em(self) -> Fraction:
        """Pixels of the em, exact: 40/3 by default."""
        return Fraction(self.font_size) * self.dpi / 72

    @property
    def width(self) -> int:
        """Pixels of a strip (W)."""
        return self.max_patches * self.patch_size

    @property
    def tinted(self) -> bool:
        """Are there colours that one channel cannot say?"""
        return self.mode == "rgb" and (self.foreground, self.background) != ((0, 0, 0), (255,) * 3)

    def shades(self) -> bytes:
        """Value of a pixel by its coverage with ink, 0 to 255; with ``tinted``, how much paper shows."""
        if self.mode == "rgb":
            return bytes(range(255, -1, -1))
        ink, paper = luma(self.foreground), luma(self.background)
        values = [(paper * (255 - c) + ink * c + 127) // 255 for c in range(256)]
        return bytes(255 * (v > 127) for v in values) if self.mode == "binary" else bytes(values)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a configuration file holds them."""
        return asdict(self) | {
            "foreground": list(self.foreground),
            "background": list(self.background),
            "features": list(self.features),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RenderSettings:
        """Settings of ``to_json``; ValueError names unknown ones."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown renderer settings: {', '.join(unknown)}")
        return cls(**values)
