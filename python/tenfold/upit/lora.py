# SPDX-License-Identifier: Apache-2.0
"""LoRA experts (S7): a shared frozen FFN whose gate, up and down have n pairs ``W + s B_e A_e``, and their routers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import ops
from tenfold.upit.options import LoraExpertsConfig

PARTS = ("gate", "up", "down")


class ExpertRouter(nn.Module):
    """A block's router: logits [T, n], weights and index [T, k] of hidden states.

    Attributes:
        weight: [n, d] float32. top_k, num_experts, norm_topk_prob: as in transformers' routers.
    """

    def __init__(self, experts: int, top_k: int, width: int, renormalize: bool) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.norm_topk_prob = top_k, experts, renormalize
        self.weight = nn.Parameter(torch.zeros(experts, width))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden states [..., d]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return ops.moe_gate_linear(rows, self.weight, self.top_k, self.norm_topk_prob)


class SoftRouter(nn.Module):
    """The router of one linear layer: logits and weights [T, n], a softmax over all experts.

    Attributes:
        weight: [n, in] float32.
    """

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.zeros(experts, width))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden states [..., in]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = F.linear(rows.to(self.weight.dtype), self.weight).float()
        return logits, logits.softmax(-1)


class LoraPairs(nn.Module):
    """The experts' parameters: ``a_gate`` [n, r, d], ``b_gate`` [n, f, r] and so on; B starts at 0."""

    def __init__(self, experts: int, rank: int, width: int, hidden: int, like: Tensor) -> None:
        super().__init__()
        made = {"dtype": like.dtype, "device": like.device}
        for part in PARTS:
            inner, outer = (hidden, width) if part == "down" else (width, hidden)
            self.register_parameter(
                f"a_{part}", nn.Parameter(torch.empty(experts, rank, inner, **made))
            )
            self.register_parameter(
                f"b_{part}", nn.Parameter(torch.zeros(experts, outer, rank, **made))
            )

    def a(self) -> list[Tensor]:
        """The factors next to the input, of gate, up and down."""
        return [getattr(self, f"a_{part}") for part in PARTS]

    def b(self) -> list[Tensor]:
        """The factors next to the output."""
        return [getattr(self, f"b_{part}") for part in PARTS]


class LoraExperts(nn.Module):
    """Takes the place of a Llama-type MLP; with all B = 0 it computes the same.

    Args:
        mlp: a module with ``gate_proj``, ``up_proj``, ``down_proj`` (linear, without bias) and SiLU, which is kept,
            frozen, as ``base``. config: see :class:`LoraExpertsConfig`.

    Attributes:
        experts: the pairs. gate: the router, of ``routing="block"``; routers: those of the linear layers, of
            ``routing="linear"``.

    Raises:
        TypeError: another kind of MLP.
    """

    def __init__(self, mlp: nn.Module, config: LoraExpertsConfig) -> None:
        super().__init__()
        linears = [getattr(mlp, f"{part}_proj", None) for part in PARTS]
        activation = getattr(mlp, "act_fn", None)
        if not all(isinstance(m, nn.Linear) and m.bias is None for m in linears) or not _is_silu(
            activation
        ):
            raise TypeError(
                f"{type(mlp).__name__} cannot have LoRA experts: supported are SwiGLU MLPs with linear gate_proj, "
                "up_proj and down_proj without bias and with SiLU (Llama, Mistral, Qwen2, SmolLM and alike)"
            )
        self.config, self.scale = config, config.alpha / config.rank
        self.base = mlp.requires_grad_(False)
        weight: Any = linears[0].weight  # type: ignore[union-attr]
        hidden, width = weight.shape
        self.experts = LoraPairs(config.experts, config.rank, width, hidden, weight)
        if config.routing == "block":
            self.gate = ExpertRouter(
                config.experts, config.experts_per_token, width, config.renormalize
            )
        else:
            sizes = {"gate": width, "up": width, "down": hidden}
            self.routers = nn.ModuleDict({p: SoftRouter(config.experts, sizes[p]) for p in PARTS})
        self.reset(torch.Generator().manual_seed(config.seed))
        self.to(weight.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """A and routers anew, B = 0. All experts have the same A, the common start that merging factors needs."""
        for a, b in zip(self.experts.a(), self.experts.b()):
            bound = a.shape[-1] ** -0.5  # as PEFT: kaiming_uniform with a = sqrt(5)
            one = (2 * torch.rand(a.shape[1:], generator=generator) - 1) * bound
            a.copy_(one.expand_as(a))
            b.zero_()
        for router in self._routers():
            drawn = torch.randn(router.weight.shape, generator=generator)
            router.weight.copy_(drawn * self.config.router_std)

    def _routers(self) -> list[Any]:
        return [self.gate] if self.config.routing == "block" else list(self.routers.values())

    def _weights(self) -> list[Tensor]:
        return [getattr(self.base, f"{part}_proj").weight for part in PARTS]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        if self.config.routing == "linear":
            gate, up = (self._linear(i, x) for i in (0, 1))
            return self._linear(2, F.silu(gate) * up)
        rows = x.reshape(-1, x.shape[-1])
        _, weight, index = self.gate(rows)
        wg, wu, wd = self._weights()
        out = ops.moe_lora_swiglu_mlp(rows, wg, wu, wd, self.experts.a(), self.experts.b(), self.scale,
                                      index, weight)  # fmt: skip
        return out.view(x.shape)

    def _linear(self, at: int, x: Tensor) -> Tensor:
        """``W x + s sum_e w_e B_e A_e x`` as two products of all experts side by side."""
        weight, a, b = self._weights()[at], self.experts.a()[at], self.experts.b()[at]
        rows = x.reshape(-1, x.shape[-1])
        _, share = self.routers[PARTS[at]](rows)
        n, rank, _ = a.shape
        low = F.linear(rows, a.flatten(0, 1)).view(-1, n, rank)
        low = (low * share.unsqueeze(-1).to(low.dtype)).flatten(1)
        wide = b.transpose(0, 1).reshape(b.shape[1], n * rank)
        made = F.linear(rows, weight) + self.scale * F.linear(low, wide)
        return made.view(*x.shape[:-1], weight.shape[0])

    def extra_repr(self) -> str:
        """The settings."""
        c = self.config
        return f"experts={c.experts}, k={c.experts_per_token}, rank={c.rank}, scale={self.scale:g}, routing={c.routing}"


def _is_silu(activation: Any) -> bool:
    return activation is F.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")
