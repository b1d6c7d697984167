# SPDX-License-Identifier: Apache-2.0
"""The U-Net's configuration: depth, widths, where it attends, and how it is conditioned; presets by name."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tenfold.training.checks import integers, not_negative, one_of, positive

FUSES = ("concat", "sum", "none")
NULLS = ("zero", "learned")
WARPS = ("none", "crash")
_PAPER_WIDTHS = (128, 128, 256, 256, *(512,) * 10)

# "paper": 20.48 s of 16 kHz stereo. "dance": attention where the unconditional trainer has it. The others are for CPUs.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "dance": {"attn_levels": tuple(range(9, 15))},
    "small": {
        "widths": (32, 32, 64, 64, 128, 128, 128),
        "attn_levels": (6, 7),
        "sample_size": 16384,
        "channels": 1,
        "sample_rate": 8000,
        "text_dim": 384,
        "fuse": "sum",
        "layers_per_level": 2,
    },
    "tiny": {
        "widths": (16, 16, 32, 32, 64, 64, 96),
        "attn_levels": (6, 7),
        "sample_size": 4096,
        "channels": 1,
        "sample_rate": 4000,
        "text_dim": 384,
        "fuse": "concat",
        "fuse_dim": 32,
        "layers_per_level": 1,
    },
}


class ErnieMusicConfig(PreTrainedConfig):
    """What an :class:`~tenfold.ernie_music.ErnieMusicUNet1D` is built from; the defaults are the paper's.

    Attributes:
        sample_rate: Hz. channels: of the waveform, C. sample_size: samples that it is trained on, L.
        widths: channels of the levels, from the waveform inwards; level i works at length L / 2**(i - 1).
        attn_levels: numbers (1: outermost) of the levels that attend to themselves and to the text.
        head_dim: of attention. layers_per_level: residual blocks on either side of a level; the paper's has 3.
        text_dim: width of the text encoder's states, d_E; 0: a model without text.
        fuse: ``"concat"``: time planes and the projected text; ``"sum"``: their sum; ``"none"``: time alone.
        fuse_dim: channels that ``"concat"`` projects the text to; None: the text as it is.
        time_frequencies: learned frequencies of the time embedding; it has twice as many values.
        null_text: what stands for no text: ``"zero"`` or a ``"learned"`` vector.
        init_scale: factor on the initial weights of the body. norm_eps: of the norms over a sample.
        condition_dropout: share of training rows that were without text; guidance needs more than 0.
        time_warp: of the sampler's times: ``"none"`` or ``"crash"``. text_encoder: name of the encoder it was
            trained with, for :func:`~tenfold.ernie_music.text_encoder_of`.

    Raises:
        ValueError, TypeError: a field that is out of range, a width that heads do not divide.

    Source:
        arXiv 2302.04456; section 3.4 of the method's specification.
    """

    model_type = "ernie_music"

    sample_rate: int = 16_000
    channels: int = 2
    sample_size: int = 327_680
    widths: tuple[int, ...] = _PAPER_WIDTHS
    attn_levels: tuple[int, ...] = (12, 13, 14)
    head_dim: int = 32
    layers_per_level: int = 3
    text_dim: int = 768
    fuse: str = "concat"
    fuse_dim: int | None = None
    time_frequencies: int = 8
    null_text: str = "zero"
    init_scale: float = 0.5
    norm_eps: float = 1e-5
    condition_dropout: float = 0.0
    time_warp: str = "none"
    text_encoder: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.widths, self.attn_levels = tuple(self.widths), tuple(sorted(self.attn_levels))
        integers(
            self,
            {
                "sample_rate": 1,
                "channels": 1,
                "sample_size": 1,
                "head_dim": 1,
                "layers_per_level": 1,
                "text_dim": 0,
                "fuse_dim": 1,
                "time_frequencies": 1,
            },
            ("fuse_dim",),
        )
        one_of("fuse", self.fuse, FUSES)
        one_of("null_text", self.null_text, NULLS)
        one_of("time_warp", self.time_warp, WARPS)
        positive("init_scale", self.init_scale)
        positive("norm_eps", self.norm_eps)
        not_negative("condition_dropout", self.condition_dropout)
        if self.condition_dropout > 1:
            raise ValueError(f"condition_dropout must be in [0, 1], got {self.condition_dropout}")
        if not self.text_dim and self.fuse != "none":
            raise ValueError(
                f"fuse {self.fuse!r} needs a text_dim; a model without text has fuse 'none'"
            )
        self._check_levels()
        super().__post_init__(**kwargs)

    def _check_levels(self) -> None:
        if len(self.widths) < 2 or any(
            isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in self.widths
        ):
            raise ValueError(f"widths must be at least two positive integers, got {self.widths}")
        wrong = [i for i in self.attn_levels if not 1 <= i <= self.depth]
        if wrong:
            raise ValueError(f"attn_levels must be in 1..{self.depth}, got {wrong}")
        if 1 in self.attn_levels:
            raise ValueError("level 1 cannot attend: its last block has the waveform's channels")
        for level in self.attn_levels:
            # The last block of a level has the width of the level outside it.
            for width in (self.widths[level - 1], self.widths[level - 2]):
                if width % self.head_dim:
                    raise ValueError(
                        f"level {level} attends over {width} channels, which heads of {self.head_dim} do not divide"
                    )

    @property
    def depth(self) -> int:
        """D, the number of levels."""
        return len(self.widths)

    @property
    def multiple(self) -> int:
        """Lengths must be multiples of this: 2 ** (depth - 1)."""
        return 2 ** (self.depth - 1)

    @property
    def time_dim(self) -> int:
        """Values of the time embedding."""
        return 2 * self.time_frequencies

    @property
    def plane_dim(self) -> int:
        """Constant planes beside the waveform: of time and text, d_t'."""
        if self.fuse == "concat":
            return self.time_dim + (self.fuse_dim or self.text_dim)
        return self.time_dim

    def valid_length(self, length: int) -> int:
        """The smallest length that the model takes and that is not below ``length``."""
        return max(3, -(-length // self.multiple)) * self.multiple

    def check_length(self, length: int) -> None:
        """ValueError, with the next valid length, unless the model takes ``length`` samples."""
        if length != self.valid_length(length):
            raise ValueError(
                f"the model takes multiples of {self.multiple} samples, at least {3 * self.multiple}; got {length}, "
                f"the next valid length is {self.valid_length(length)} (or give pad_to_valid=True)"
            )

    @classmethod
    def from_preset(cls, name: str = "paper", **changes: Any) -> ErnieMusicConfig:
        """A preset with some fields changed: ``"paper"``, ``"dance"``, ``"small"`` or ``"tiny"``."""
        one_of("preset", name, tuple(PRESETS))
        return cls(**(PRESETS[name] | changes))


AutoConfig.register(ErnieMusicConfig.model_type, ErnieMusicConfig, exist_ok=True)
