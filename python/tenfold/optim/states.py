# SPDX-License-Identifier: Apache-2.0
"""AdamW's states in their forms: dense, compact (only the trained elements), or 8-bit codes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.optim.masks import Mask, local
from tenfold.reference.optim.adamw import STATE_BLOCK, dequantize, dynamic_code, nearest_code

DTYPES = ("param", "fp32", "bf16", "int8")
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Smaller tensors have float32 states under "int8": nothing is saved, and norms and biases are sensitive.
LEAST_INT8 = 4096


@functools.lru_cache
def code_books(device: torch.device) -> tuple[Tensor, Tensor]:
    """(signed, unsigned) code books for the first and second moment."""
    return dynamic_code(True).to(device), dynamic_code(False).to(device)


def state_dtype(choice: str, parameter: Tensor) -> torch.dtype:
    """dtype of the moments; uint8 stands for 8-bit codes."""
    if choice == "param":
        return parameter.dtype
    if choice == "int8":
        # The whole tensor counts, not a rank's shard.
        return torch.uint8 if parameter.numel() >= LEAST_INT8 else torch.float32
    return torch.float32 if choice == "fp32" else torch.bfloat16


class Layout:
    """The form of one parameter's states: dtype, and the mask if they are compact."""

    def __init__(self, parameter: Tensor, choice: str, mask: Mask | None, compact: bool) -> None:
        self.parameter = parameter
        self.dtype = state_dtype(choice, parameter)
        self.coded = self.dtype == torch.uint8
        self.mask = mask if compact and not self.coded else None
        here = local(parameter)
        self.numel = here.numel() if self.mask is None else self.mask.count(here)

    def zeros(self, device: torch.device, amsgrad: bool) -> dict[str, Tensor]:
        """Fresh states."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        names = MOMENTS[: 3 if amsgrad else 2]
        if not self.coded:
            return state | {n: self._blank(device) for n in names}
        here = local(self.parameter)
        for i, code in enumerate(code_books(device)):
            zero = int((code == 0).nonzero()[0])
            state[names[i]] = torch.full_like(here, zero, dtype=torch.uint8, device=device)
            blocks = -(-here.numel() // STATE_BLOCK)
            state[f"absmax{i + 1}"] = torch.zeros(blocks, device=device)
        return state

    def _blank(self, device: torch.device) -> Tensor:
        if self.mask is not None:
            return torch.zeros(self.numel, dtype=self.dtype, device=device)
        return torch.zeros_like(
            self.parameter, dtype=self.dtype, device=device, memory_format=torch.preserve_format
        )

    def dense(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The moments as float tensors of the local shape, 0 where nothing is kept."""
        here = local(self.parameter)
        made = {}
        for name in MOMENTS:
            if name not in state:
                continue
            value = local(state[name])
            if self.coded:
                at = MOMENTS.index(name)
                code = code_books(value.device)[at]
                codes = value.as_strided((value.numel(),), (1,))
                flat = dequantize(codes, state[f"absmax{at + 1}"], code)
                made[name] = flat.as_strided(here.shape, here.stride())
            elif self.mask is not None:
                flat = torch.zeros(here.numel(), dtype=value.dtype, device=value.device)
                flat[self.mask.elements(here).to(value.device)] = value.view(-1)
                made[name] = flat.as_strided(here.shape, here.stride())
            else:
                made[name] = value
        return made

    def store(
        self, dense: dict[str, Tensor], step: Tensor, device: torch.device
    ) -> dict[str, Tensor]:
        """States in this form, from dense moments; a fresh copy."""
        state = self.zeros(device, "max_exp_avg_sq" in dense and not self.coded)
        state["step"].copy_(step)
        here = local(self.parameter)
        for name, value in dense.items():
            if name not in state:
                continue
            if tuple(value.shape) != tuple(here.shape):
                raise ValueError(
                    f"a state {name} of {list(value.shape)} for a parameter {list(here.shape)}"
                )
            kept = torch.empty_like(
                here, dtype=torch.float32 if self.coded else self.dtype, device=device
            )
            kept.copy_(value)
            flat = kept.as_strided((kept.numel(),), (1,))
            if self.coded:
                at = MOMENTS.index(name)
                blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % STATE_BLOCK)).view(
                    -1, STATE_BLOCK
                )
                scale = blocks.abs().amax(1)
                unit = torch.where(
                    scale[:, None] == 0, torch.zeros_like(blocks), blocks / scale[:, None]
                )
                codes = nearest_code(unit.view(-1)[: flat.numel()], code_books(device)[at])
                state[name].as_strided((codes.numel(),), (1,)).copy_(codes)
                state[f"absmax{at + 1}"].copy_(scale)
            elif self.mask is not None:
                state[name].copy_(flat[self.mask.elements(here).to(device)])
            else:
                local(state[name]).copy_(kept)
        return state

    def fits(self, state: dict[str, Any]) -> bool:
        """Are these states in this form already?"""
        names = [n for n in MOMENTS if n in state]
        return all(
            isinstance(state[n], Tensor)
            and state[n].dtype == self.dtype
            and local(state[n]).numel() == self.numel
            for n in names
        ) and (not self.coded or "absmax1" in state)

    @staticmethod
    def prefix(mask: Mask) -> Tensor:
        """What the kernels need to find a trained element's place in compact states."""
        return ops.mask_prefix(mask.packed)
