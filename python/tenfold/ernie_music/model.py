# SPDX-License-Identifier: Apache-2.0
"""The conditional U-Net over waveforms as a transformers class.

    unet = ErnieMusicUNet1D(ErnieMusicConfig.from_preset("small"))
    v = unet(z, t, states, mask).sample  # z [B, C, L], t [B] in [0, 1], states [B, n, d_E] of any text encoder

It predicts the velocity ``v = a eps - s x0`` of ``z = a x0 + s eps`` with ``a = cos(pi t / 2)``, ``s = sin(pi t / 2)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from tenfold.ernie_music.blocks import Condition, Level, TimeEmbedding, set_kernels
from tenfold.ernie_music.config import ErnieMusicConfig


@dataclass
class UNet1DOutput(ModelOutput):
    """What the model returns: ``sample`` [B, C, L], the predicted velocity."""

    sample: Tensor | None = None


def check_times(
    t: Tensor | float, batch: int, device: torch.device, op: str = "timestep"
) -> Tensor:
    """Times as float32 or float64 [B]; ValueError says what is wrong with them.

    Values are looked at where that costs no synchronisation: on the CPU.
    """
    if not isinstance(t, Tensor):
        t = torch.tensor(float(t), dtype=torch.float64)
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op} must be float32 or float64 (shorter types lose steps), got {t.dtype}"
        )
    if t.ndim > 1 or (t.ndim == 1 and t.numel() not in (1, batch)):
        raise ValueError(f"{op} must be a scalar or [{batch}], got {list(t.shape)}")
    if (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bool(((t >= 0) & (t <= 1)).all())
    ):
        raise ValueError(f"{op} must be in [0, 1], got {t.flatten()[:4].tolist()}")
    return t.to(device).expand(batch)


class ErnieMusicUNet1D(PreTrainedModel):
    """Text and time to a waveform's velocity (arXiv 2302.04456; section 3.4 of the method's specification)."""

    config: ErnieMusicConfig
    config_class = ErnieMusicConfig
    base_model_prefix = "unet"
    main_input_name = "sample"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ResBlock", "ConditionalSelfAttention"]

    def __init__(self, config: ErnieMusicConfig) -> None:
        super().__init__(config)
        self.time = TimeEmbedding(config.time_frequencies)
        self.project: nn.Linear | None = None
        if config.fuse == "sum":
            self.project = nn.Linear(config.text_dim, config.time_dim)
        elif config.fuse == "concat" and config.fuse_dim:
            self.project = nn.Linear(config.text_dim, config.fuse_dim)
        learned = config.null_text == "learned" and config.fuse != "none"
        self.null = nn.Parameter(torch.zeros(config.text_dim)) if learned else None
        self.body = Level(config, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # PyTorch's defaults, times init_scale in the body.
        scale = 1.0 if module is self.project else self.config.init_scale
        if isinstance(module, TimeEmbedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.Conv1d | nn.Linear):
            bound = scale / module.weight[0].numel() ** 0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            init.constant_(module.weight, scale)
            init.zeros_(module.bias)
        elif module is self and self.null is not None:
            init.normal_(self.null)

    def set_kernels(self, kernels: str) -> ErnieMusicUNet1D:
        """Fused operations come from ``"tenfold"`` (default), or are plain ``"torch"``."""
        set_kernels(self, kernels)
        return self

    def _check_sample(self, sample: Tensor) -> None:
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise TypeError(
                f"sample must be a floating tensor, got {getattr(sample, 'dtype', type(sample))}"
            )
        if sample.ndim != 3 or sample.shape[1] != self.config.channels:
            raise ValueError(
                f"sample must be [B, {self.config.channels}, L], got {list(sample.shape)}"
            )
        self.config.check_length(sample.shape[2])

    def condition(
        self,
        t: Tensor,
        states: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Condition:
        """What all blocks read: planes [B, d_t'] of time and text, and the text's keys.

        Args:
            t: float32 [B]. states: [B, n, d_E], the first token's is ``s0``. mask: bool or 0/1 [B, n]; a row
                without tokens is one without text.
        """
        batch, config = t.shape[0], self.config
        planes = self.time(t)
        if states is None:
            pooled = planes.new_zeros(batch, config.text_dim)
            present = torch.zeros(batch, dtype=torch.bool, device=t.device)
            keys = key_mask = None
        else:
            if states.ndim != 3 or states.shape[0] != batch or states.shape[2] != config.text_dim:
                raise ValueError(
                    f"encoder_hidden_states must be [{batch}, n, {config.text_dim}], got {list(states.shape)}"
                )
            if mask is None:
                mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            if mask.shape != states.shape[:2]:
                raise ValueError(
                    f"encoder_attention_mask must be {list(states.shape[:2])}, got {list(mask.shape)}"
                )
            mask = mask.to(torch.bool)
            present = mask.any(1)
            # What stands in padded places, NaN included, must not be read.
            states = states.masked_fill(~mask[:, :, None], 0)
            pooled, keys, key_mask = states[:, 0], states[:, 1:], mask[:, 1:]
        if config.fuse == "none":
            return Condition(planes, keys, key_mask)
        if self.null is not None:
            pooled = torch.where(present[:, None], pooled, self.null.to(pooled.dtype))
        text = (
            pooled if self.project is None else self.project(pooled.to(self.project.weight.dtype))
        )
        text = text.float()
        if self.project is not None and self.null is None:
            text = text * present[:, None]
        fused = planes + text if config.fuse == "sum" else torch.cat([planes, text], 1)
        return Condition(fused, keys, key_mask)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet1DOutput | tuple[Tensor]:
        """The velocity of noisy waveforms.

        Args:
            sample: floating [B, C, L]; L as :meth:`ErnieMusicConfig.valid_length` says.
            timestep: float32 or float64, scalar or [B], in [0, 1].
            encoder_hidden_states: [B, n, d_E] of a text encoder, the first token's first; None: no text.
            encoder_attention_mask: [B, n], 1 or True: a token; a row of zeros is without text.

        Raises:
            TypeError, ValueError: what has another type, shape or range.
        """
        if kwargs:
            raise TypeError(f"forward has no arguments {', '.join(sorted(kwargs))}")
        self._check_sample(sample)
        t = check_times(timestep, sample.shape[0], sample.device).float()
        found = self.condition(t, encoder_hidden_states, encoder_attention_mask)
        x = sample.to(self.dtype)
        found.planes = found.planes.to(x.dtype)
        v = self.body(x, found)
        return UNet1DOutput(sample=v) if return_dict else (v,)
