# SPDX-License-Identifier: Apache-2.0
"""The whole U-Net, and its fused operations alone, on the kernels against plain PyTorch, in one run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from tenfold.ernie_music.blocks import KERNELS, Fused, operations
from tenfold.ernie_music.config import ErnieMusicConfig
from tenfold.ernie_music.model import ErnieMusicUNet1D
from tenfold.report import Speedup, speedup

COLUMNS = ("the whole U-Net", "plain PyTorch", "tenfold", "times as fast")
PARTS = ("forward", "training step")


def compare(
    config: ErnieMusicConfig, batch_size: int = 8, repeats: int = 7, seed: int = 0
) -> dict[str, Any]:
    """Seconds of a forward pass and of a training step (forward and backward), float32 on the CPU.

    Both nets take turns, call by call; medians after one call that is not counted. Returns
    ``{part: {"tenfold": s, "torch": s, "ratio": torch / tenfold}}``.
    """
    made = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = ErnieMusicUNet1D(config)
    x = torch.randn(batch_size, config.channels, config.sample_size, generator=made)
    t = torch.rand(batch_size, generator=made)
    states = (
        torch.randn(batch_size, 16, config.text_dim, generator=made) if config.text_dim else None
    )

    def call(part: str) -> None:
        if part == "forward":
            with torch.no_grad():
                unet(x, t, states)
            return
        unet.zero_grad(set_to_none=True)
        (unet(x, t, states).sample - x).square().mean().backward()

    times: dict[str, dict[str, list[float]]] = {p: {k: [] for k in KERNELS} for p in PARTS}
    for turn in range(repeats + 1):
        for part in PARTS:
            for kernels in KERNELS:
                unet.set_kernels(kernels)
                start = time.perf_counter()
                call(part)
                if turn:
                    times[part][kernels].append(time.perf_counter() - start)
    found: dict[str, Any] = {}
    for part, by in times.items():
        medians = {k: statistics.median(v) for k, v in by.items()}
        found[part] = medians | {"ratio": medians["torch"] / medians["tenfold"]}
    return found


class _Watch:
    """The kernels, with a list of the calls that they got."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            return getattr(operations("tenfold"), name)(*args, **options)

        return call


@torch.no_grad()
def fused(
    unet: ErnieMusicUNet1D, z: Tensor, t: Tensor, states: Tensor | None, mask: Tensor | None
) -> tuple[Speedup, float]:
    """(all fused operations of one forward pass on their own inputs against plain PyTorch, the largest difference).

    z [B, C, L], t [B], states [B, n, d_E] and mask [B, n] are what the net is called with.
    """
    watch = _Watch()
    parts = [m for m in unet.modules() if isinstance(m, Fused)]
    for part in parts:
        part.watched = watch
    try:
        unet(z, t, states, mask)
    finally:
        for part in parts:
            del part.watched

    def by(kernels: str) -> list[Tensor]:
        source = operations(kernels)
        made = [getattr(source, name)(*args, **options) for name, args, options in watch.calls]
        return [x[0] if isinstance(x, tuple) else x for x in made]

    apart = max(float((a - b).abs().max()) for a, b in zip(by("tenfold"), by("torch")))
    names = "gn1_gelu and FIR resampling", "F.group_norm, F.gelu, F.conv1d"
    return speedup(*names, lambda: by("tenfold"), lambda: by("torch")), apart


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return [
        [part, f"{1000 * r['torch']:.0f} ms", f"{1000 * r['tenfold']:.0f} ms", f"{r['ratio']:.2f}"]
        for part, r in found.items()
    ]
