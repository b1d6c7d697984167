# SPDX-License-Identifier: Apache-2.0
"""From prompts to waveforms: the pipeline, in diffusers' form.

pipe = ErnieMusicPipeline.from_pretrained(folder)
made = pipe("a calm piano piece", num_inference_steps=50, guidance_scale=3.0)
made.save("piano.wav")
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.ernie_music.audio import SUBTYPES, fit_length, with_channels, write_audio
from tenfold.ernie_music.guidance import Guidance
from tenfold.ernie_music.model import ErnieMusicUNet1D
from tenfold.ernie_music.scheduler import VDiffusionScheduler, check_eta
from tenfold.ernie_music.text import TextStates, text_encoder_of
from tenfold.training.loop import progress_bar
from tenfold.training.store import write_text

INDEX = "model_index.json"
StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class AudioPipelineOutput:
    """What the pipeline made.

    Attributes:
        audios: [B, C, S] in [-1, 1], float32 (numpy or torch). sample_rate: Hz. prompts: one per waveform.
    """

    audios: Any
    sample_rate: int
    prompts: list[str]

    def save(self, path: str | Path, subtype: str = "int16") -> list[Path]:
        """Writes the waveforms: one to ``path``, several to ``path`` with ``-0``, ``-1``, ... before its ending."""
        if subtype not in SUBTYPES:
            raise ValueError(f"subtype must be one of {', '.join(SUBTYPES)}, got {subtype!r}")
        path, audios = Path(path), torch.as_tensor(self.audios)
        names = [path]
        if len(audios) > 1:
            names = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(audios))]
        return [write_audio(n, a, self.sample_rate, subtype) for n, a in zip(names, audios)]


def _listed(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


class ErnieMusicPipeline:
    """U-Net, scheduler and text encoder together.

    Args:
        unet: an :class:`~tenfold.ernie_music.ErnieMusicUNet1D`. scheduler: default a new one.
        text_encoder: texts -> (states [B, n, d_E], mask [B, n]); default: the one that the U-Net's configuration names.
    """

    def __init__(
        self,
        unet: ErnieMusicUNet1D,
        scheduler: VDiffusionScheduler | None = None,
        text_encoder: TextStates | Callable[[list[str]], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.unet = unet.eval()
        self.scheduler = scheduler or VDiffusionScheduler(time_warp=unet.config.time_warp)
        if text_encoder is None and unet.config.text_encoder:
            text_encoder = text_encoder_of(unet.config.text_encoder)
        width = getattr(text_encoder, "width", unet.config.text_dim)
        if text_encoder is not None and width != unet.config.text_dim:
            raise ValueError(
                f"the text encoder's states are {width} wide, the U-Net takes {unet.config.text_dim}"
            )
        self.text_encoder = text_encoder
        self.quiet = False

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.unet.device

    def to(self, *args: Any, **kwargs: Any) -> ErnieMusicPipeline:
        """Moves the U-Net."""
        self.unet.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, disable: bool = False) -> None:
        """Turns the bar off, or on again."""
        self.quiet = disable

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``unet/``, ``scheduler/`` and ``model_index.json``; the text encoder is stored by its name."""
        from tenfold.data.models import quiet_transformers

        folder = Path(folder)
        if self.text_encoder is not None:
            self.unet.config.text_encoder = getattr(
                self.text_encoder, "name", self.unet.config.text_encoder
            )
        with quiet_transformers():
            self.unet.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        index = {
            "_class_name": type(self).__name__,
            "unet": "unet",
            "scheduler": "scheduler",
            "text_encoder": self.unet.config.text_encoder,
        }
        write_text(folder / INDEX, json.dumps(index, indent=1))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, text_encoder: Any = None, torch_dtype: torch.dtype | None = None
    ) -> ErnieMusicPipeline:
        """Reads what ``save_pretrained`` wrote, or training; ``text_encoder`` replaces the stored name."""
        from tenfold.data.models import quiet_transformers

        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} has no {INDEX}: it is no folder of an ErnieMusicPipeline")
        with quiet_transformers():
            unet = ErnieMusicUNet1D.from_pretrained(folder / "unet", dtype=torch_dtype or "auto")
        for parameter in unet.parameters():
            # In the mapped file weights start at any address, and by that some matmuls choose how they add up.
            parameter.data = parameter.data.clone()
        return cls(unet, VDiffusionScheduler.from_pretrained(folder / "scheduler"), text_encoder)

    def encode(self, prompts: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """States and mask of prompts on the U-Net's device; (None, None) without an encoder."""
        if self.text_encoder is None:
            if any(p.strip() for p in prompts):
                raise ValueError(
                    "this pipeline has no text encoder; give text_encoder=, or empty prompts"
                )
            return None, None
        states, mask = self.text_encoder(prompts)
        return states.to(self.device), mask.to(self.device)

    def _lengths(
        self, audio_end_in_s: float | None, audio_length: int | None, pad_to_valid: bool
    ) -> tuple[int, int]:
        config = self.unet.config
        if audio_length is not None and audio_end_in_s is not None:
            raise ValueError("give audio_end_in_s or audio_length, not both")
        if audio_end_in_s is not None:
            if not audio_end_in_s > 0:
                raise ValueError(f"audio_end_in_s must be positive, got {audio_end_in_s}")
            audio_length = max(1, round(audio_end_in_s * config.sample_rate))
            pad_to_valid = True
        wanted = audio_length or config.sample_size
        if not pad_to_valid:
            config.check_length(wanted)
        return wanted, config.valid_length(wanted)

    def _start_noise(self, shape: tuple[int, ...], generator: Any) -> Tensor:
        if isinstance(generator, list):
            if len(generator) != shape[0]:
                raise ValueError(f"{len(generator)} generators for {shape[0]} waveforms")
            return torch.cat([self._start_noise((1, *shape[1:]), g) for g in generator])
        where = generator.device if generator is not None else "cpu"
        return torch.randn(shape, generator=generator, device=where).to(self.device)

    def _known(self, audio: Any, count: int, length: int, name: str) -> Tensor:
        x = torch.as_tensor(audio)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.ndim < 3:
            x = with_channels(x[None] if x.ndim == 1 else x, self.unet.config.channels)[None]
        if x.ndim != 3 or x.shape[0] not in (1, count) or x.shape[1] != self.unet.config.channels:
            raise ValueError(
                f"{name} must be [S], [C, S] or [{count}, {self.unet.config.channels}, S], got {list(x.shape)}"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
        return fit_length(x.float(), length).expand(count, -1, -1).to(self.device).contiguous()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Tensor = 1.0,
        audio_end_in_s: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        audio_length: int | None = None,
        pad_to_valid: bool = False,
        num_waveforms_per_prompt: int = 1,
        eta: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        cfg_plus_plus: bool = False,
        init_audio: Any = None,
        strength: float = 0.7,
        inpaint_audio: Any = None,
        inpaint_mask: Any = None,
        noise: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
    ) -> AudioPipelineOutput | tuple[Any]:
        """Waveforms of prompts.

        Args:
            prompt: one or several; ``""``: without text. negative_prompt: what guidance leads away from; default: no
                text.
            num_inference_steps: default: the scheduler's. guidance_scale: g, or one per waveform [B]; 1: without
                guidance.
            audio_end_in_s: seconds of the result; default: what the model was trained on (other lengths sound worse).
            generator: of the noise; several: one per waveform, whose noise then does not depend on the others.
            audio_length: samples in the place of seconds; must be valid, unless ``pad_to_valid`` (more are made, and
                cut).
            num_waveforms_per_prompt: of each. eta: 0: DDIM, 1: ancestral; default: the scheduler's.
            guidance_interval: times at which there is guidance. guidance_rescale: share, 0 to 1, of a correction that
                keeps
                the deviation of the guided velocity that of the conditional one. cfg_plus_plus: see the scheduler.
            init_audio: [S], [C, S] or [B, C, S], the audio to start from, noised to time ``strength`` in (0, 1].
            inpaint_audio, inpaint_mask: audio, and [S] or broadcastable, True or 1: is known and stays.
            noise: [B, C, L] in the place of drawn noise. output_type: ``"np"`` or ``"pt"``.
            callback_on_step_end: (pipeline, step, time, {"latents": z}) -> {} or {"latents": another z}.

        Raises:
            ValueError, TypeError: lengths, guidance, shapes, see each argument.
        """
        prompts = [p for p in _listed(prompt) for _ in range(num_waveforms_per_prompt)]
        count = len(prompts)
        if not count:
            raise ValueError("there is no prompt")
        if output_type not in ("np", "pt"):
            raise ValueError(f"output_type must be 'np' or 'pt', got {output_type!r}")
        if eta is not None:
            check_eta(eta)
        if (inpaint_audio is None) != (inpaint_mask is None):
            raise ValueError("inpainting needs both inpaint_audio and inpaint_mask")
        guide = Guidance(guidance_scale, guidance_interval, guidance_rescale, cfg_plus_plus, count)
        if guide.on and self.unet.config.condition_dropout == 0 and negative_prompt is None:
            warnings.warn(
                "guidance: this model was trained without condition dropout, so it has not learnt what no text is; "
                "use guidance_scale=1 or a negative_prompt",
                stacklevel=3,
            )
        wanted, length = self._lengths(audio_end_in_s, audio_length, pad_to_valid)
        shape = (count, self.unet.config.channels, length)
        start = self._start_noise(shape, generator) if noise is None else noise.to(self.device)
        if start.shape != shape:
            raise ValueError(f"noise must be {list(shape)}, got {list(start.shape)}")
        text = self.encode(prompts)
        other = None
        if guide.on:
            negative = _listed(negative_prompt or "")
            if len(negative) not in (1, len(_listed(prompt))):
                raise ValueError(
                    f"{len(negative)} negative prompts for {len(_listed(prompt))} prompts"
                )
            each = count if len(negative) == 1 else num_waveforms_per_prompt
            other = self.encode([n for n in negative for _ in range(each)])
        scheduler = self.scheduler
        first = 1.0
        if init_audio is not None:
            if not 0 < strength <= 1:
                raise ValueError(f"strength must be in (0, 1], got {strength}")
            first = strength
        scheduler.set_timesteps(num_inference_steps, self.device, start=first)
        z = start
        if init_audio is not None:
            z = scheduler.add_noise(
                self._known(init_audio, count, length, "init_audio"), start, scheduler.timesteps[:1]
            )
        fixed = None
        if inpaint_audio is not None:
            known = self._known(inpaint_audio, count, length, "inpaint_audio")
            mask = fit_length(torch.as_tensor(inpaint_mask).float(), length).to(self.device) > 0.5
            fixed = (known, mask.expand(known.shape))
            z = torch.where(fixed[1], scheduler.add_noise(known, start, scheduler.timesteps[:1]), z)
        x0 = self._sample(z, text, other, guide, eta, generator, fixed, start, callback_on_step_end)
        audio = x0[..., :wanted].float().clamp(-1, 1).cpu()
        made: Any = np.ascontiguousarray(audio.numpy()) if output_type == "np" else audio
        if not return_dict:
            return (made,)
        return AudioPipelineOutput(made, self.unet.config.sample_rate, prompts)

    def _sample(
        self,
        z: Tensor,
        text: Any,
        other: Any,
        guide: Guidance,
        eta: float | None,
        generator: Any,
        fixed: Any,
        start: Tensor,
        callback: StepEnd | None,
    ) -> Tensor:
        scheduler, x0 = self.scheduler, z
        times = scheduler.timesteps.tolist()
        noisy = (scheduler.config.eta if eta is None else eta) > 0
        with progress_bar("sampling", len(times), 0, not self.quiet) as advance:
            for i, time in enumerate(times):
                t = scheduler.timesteps[i]
                v, free, scale = guide.velocities(self.unet, z, t, time, text, other)
                made = scheduler.step(
                    v,
                    time,
                    z,
                    eta,
                    uncond_output=free,
                    guidance_scale=scale,
                    cfg_plus_plus=guide.plus and free is not None,
                    noise=self._start_noise(tuple(z.shape), generator) if noisy else None,
                )
                z, x0 = made.prev_sample, made.pred_original_sample  # type: ignore[union-attr]
                if fixed is not None:
                    known, mask = fixed
                    last = i + 1 == len(times)
                    then = (
                        known
                        if last
                        else scheduler.add_noise(known, start, scheduler.timesteps[i + 1 : i + 2])
                    )
                    z, x0 = torch.where(mask, then, z), torch.where(mask, known, x0)
                if callback is not None:
                    z = callback(self, i, t, {"latents": z}).get("latents", z)
                advance({})
        return x0
