# SPDX-License-Identifier: Apache-2.0
"""A scheduler for velocities in continuous time, with the methods of diffusers' schedulers.

    scheduler.set_timesteps(50)
    for t in scheduler.timesteps:
        z = scheduler.step(unet(z, t).sample, t, z).prev_sample

Times run from 1 (noise) to 0 (data): ``t_i = 1 - i / N``. Steps are DDIM (eta 0), ancestral (eta 1, the posterior),
anything between, or the second-order DPM-Solver++.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.ernie_music.config import WARPS
from tenfold.ernie_music.diffusion import schedule, vdiff_operations, warped
from tenfold.training.checks import integers, one_of
from tenfold.training.store import write_text

SOLVERS = ("ddim", "dpm++")
FILE = "scheduler_config.json"


@dataclass(frozen=True)
class VDiffusionSchedulerConfig:
    """Settings of the scheduler.

    Attributes:
        num_inference_steps: default of :meth:`VDiffusionScheduler.set_timesteps`. time_warp: ``"none"`` or ``"crash"``.
        solver: ``"ddim"``, or ``"dpm++"`` (second order; deterministic). eta: 0: DDIM, 1: ancestral.
        clip: x0 is clamped to [-clip, clip] in every step; None: not. use_clipped_model_output: the noise then follows
            from the clamped x0.
    """

    num_inference_steps: int = 100
    time_warp: str = "none"
    solver: str = "ddim"
    eta: float = 0.0
    clip: float | None = None
    use_clipped_model_output: bool = False

    def __post_init__(self) -> None:
        integers(self, {"num_inference_steps": 1})
        one_of("time_warp", self.time_warp, WARPS)
        one_of("solver", self.solver, SOLVERS)
        check_eta(self.eta)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")


def check_eta(eta: float) -> None:
    """ValueError unless 0 <= eta <= 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")


@dataclass
class VDiffusionSchedulerOutput:
    """``prev_sample`` [B, C, L], at the next time; ``pred_original_sample`` [B, C, L], the data that it points at."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class VDiffusionScheduler:
    """Steps from noise to data by predicted velocities (section 3.5 of the method's specification)."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, kernels: str = "tenfold", **settings: Any) -> None:
        self.config = VDiffusionSchedulerConfig(**settings)
        self.kernels = kernels
        self.set_timesteps(self.config.num_inference_steps)

    # What diffusers' pipelines call.

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, start: float = 1.0
    ) -> None:
        """The grid of a run: N times from ``start`` on, evenly spaced down to 0, then warped.

        ``start`` below 1 begins at a noisy version of given audio. Sets ``timesteps`` float32 [N] (without the final
        0)."""
        n = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {n!r}")
        if not 0 < start <= 1:
            raise ValueError(f"start must be in (0, 1], got {start}")
        grid = start * (1 - torch.arange(n + 1, dtype=torch.float64) / n)
        grid = warped(grid, self.config.time_warp)
        grid[-1] = 0
        self._grid = grid.to(device=device)
        self._known = grid.float().tolist()
        self._levels = tuple(x.tolist() for x in schedule(grid))  # read without asking the device
        self.num_inference_steps = n
        self.timesteps = self._grid[:-1].float()
        self._index: int | None = None
        self._last: tuple[int, Tensor] | None = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: it has unit variance at all times."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``a x + s n`` at times [B] or one."""
        return self._noising(original_samples, noise, timesteps)[0]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``a n - s x``, what the model learns to predict."""
        return self._noising(sample, noise, timesteps)[1]

    def _noising(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t).to(x.device)
        return vdiff_operations(self.kernels).vdiff_noise(x, t, noise)

    def _at(self, timestep: Any) -> int:
        if self._index is None:
            wanted = float(timestep)
            near = min(range(self.num_inference_steps), key=lambda i: abs(self._known[i] - wanted))
            if abs(self._known[near] - wanted) > 1e-5:
                raise ValueError(
                    f"timestep {wanted} is none of this run's; call set_timesteps first"
                )
            self._index = near
        if self._index >= self.num_inference_steps:
            raise ValueError("the run is over; call set_timesteps before another")
        return self._index

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        cfg_plus_plus: bool = False,
        noise: Tensor | None = None,
    ) -> VDiffusionSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the run.

        Args:
            model_output: velocity [B, C, L]. timestep: one of ``timesteps``; looked at in the first step only, later
                ones follow it. sample: [B, C, L] at that time.
            eta: default: the settings'. generator, noise: of the noise where eta > 0; given noise wins.
            uncond_output: velocity without the text; with ``guidance_scale`` g, a number or [B], the velocity is
                ``v_u + g (v_c - v_u)``. cfg_plus_plus: the noise is that of ``uncond_output``.

        Raises:
            ValueError: guidance without ``uncond_output``, eta out of range, a time that is not the run's.
        """
        i = self._at(timestep)
        eta = self.config.eta if eta is None else eta
        check_eta(eta)
        g = None
        if uncond_output is not None:
            g = torch.as_tensor(guidance_scale, dtype=torch.float32, device=sample.device)
        elif isinstance(guidance_scale, Tensor) or guidance_scale != 1.0:
            raise ValueError(
                "guidance_scale other than 1 needs uncond_output, the velocity without the text"
            )
        t, u = self._grid[i], self._grid[i + 1]
        if eta > 0 and noise is None:
            where = generator.device if generator is not None else sample.device
            noise = torch.randn(
                sample.shape, generator=generator, device=where, dtype=torch.float32
            )
            noise = noise.to(sample.device, sample.dtype)
        z, x0 = vdiff_operations(self.kernels).vdiff_step(
            sample,
            model_output,
            uncond_output,
            t.to(sample.device),
            u.to(sample.device),
            g,
            eta,
            noise if eta > 0 else None,
            self.config.clip,
            use_clipped_model_output=self.config.use_clipped_model_output,
            cfg_plus_plus=cfg_plus_plus,
        )
        if self.config.solver == "dpm++" and eta == 0 and not cfg_plus_plus:
            z = self._second_order(i, sample, x0)
        self._index = i + 1
        return VDiffusionSchedulerOutput(z, x0) if return_dict else (z, x0)

    def _second_order(self, i: int, sample: Tensor, x0: Tensor) -> Tensor:
        """DPM-Solver++ (2M): x0 is extrapolated along the log of the signal-to-noise ratio."""
        (a, s), last = self._levels, self._last
        self._last = (i, x0)
        ratio, guess = s[i + 1] / s[i], x0
        # At t = 1 and t = 0 that log is infinite: first and last step are of first order.
        if last is not None and last[0] == i - 1 and a[i - 1] > 1e-9 and i + 2 < len(a):
            before, now, then = (math.log(a[k] / s[k]) for k in (i - 1, i, i + 1))
            guess = x0 + (then - now) / (2 * (now - before)) * (x0 - last[1])
        return ratio * sample + (a[i + 1] - ratio * a[i]) * guess

    # Files.

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``scheduler_config.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(
            Path(folder) / FILE,
            json.dumps({"_class_name": type(self).__name__} | asdict(self.config), indent=1),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> VDiffusionScheduler:
        """Reads what ``save_pretrained`` wrote."""
        found = json.loads((Path(folder) / FILE).read_text())
        found.pop("_class_name", None)
        return cls(**(found | changes))

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> VDiffusionScheduler:
        """A scheduler with the settings of another one, or of a mapping."""
        values = dict(config) if isinstance(config, dict) else asdict(config)
        return cls(**(values | changes))

    def __len__(self) -> int:
        return self.num_inference_steps


class KDenoiser:
    """The model as k-diffusion's samplers call it: ``denoised = f(x, sigma)`` with ``x = data + sigma noise``.

    ``sigma = tan(pi t / 2)``; the model reads ``z = x cos(pi t / 2)``, and ``denoised = a z - s v``.

    Args:
        model: (z [B, C, L], t [B]) -> velocity [B, C, L].
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised waveform [B, C, L] of x at noise levels [B]; ``kwargs`` go to the model."""
        t = (torch.atan(sigma) * (2 / torch.pi)).expand(x.shape[0])
        a, s = (p.view(-1, 1, 1) for p in schedule(t))
        z = x * a
        return a * z - s * self.model(z, t, **kwargs)
