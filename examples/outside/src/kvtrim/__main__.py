# SPDX-License-Identifier: Apache-2.0
"""``python -m kvtrim``: the block in eager mode, compiled and exported, with the differences."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kvtrim import TrimmingAttention


class Step(torch.nn.Module):
    """Prompt, trim, one decoded token: the part of a model that one would compile."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TrimmingAttention()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, k, v, kept = self.block(x)
        return out, self.block.decode(out[:, -1:], k, v), kept


def report(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Prints the largest difference; exits if it is more than rounding."""
    if not torch.equal(got[-1], want[-1]):
        raise SystemExit(f"{name}: other slots were kept")
    worst = max(float((a - b).abs().max()) for a, b in zip(got[:-1], want[:-1], strict=True))
    if not worst < 1e-4:
        raise SystemExit(f"{name}: differs from eager by {worst:g}")
    print(f"{name:<40} kept {got[-1].shape[-1]} slots per head, largest difference {worst:.1e}")


def main() -> None:
    """Runs the three forms on two prompt lengths."""
    parser = argparse.ArgumentParser(prog="python -m kvtrim", description=__doc__)
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    backend = parser.parse_args().backend

    torch.manual_seed(0)
    step = Step().eval()
    prompts = [torch.randn(2, length, 256) for length in (200, 333)]
    with torch.no_grad():
        want = [step(x) for x in prompts]
        report("eager", want[0], want[0])

        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
        for x, expected in zip(prompts, want, strict=True):
            report(f"torch.compile, {x.shape[1]} tokens", compiled(x), expected)

        length = torch.export.Dim("length", min=64, max=8192)
        program = torch.export.export(step, (prompts[0],), dynamic_shapes={"x": {1: length}})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.pt2"
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
        for x, expected in zip(prompts, want, strict=True):
            report(f"torch.export, {x.shape[1]} tokens", loaded(x), expected)


if __name__ == "__main__":
    main()
